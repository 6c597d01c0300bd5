import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tessera.data import Batch, Task, benchmark, readers
from tessera.errors import InputError, UnknownNameError

needs_fashion = pytest.mark.skipif(
    not readers.FASHION_MNIST.is_dir(),
    reason="needs the Debian package: apt install dataset-fashion-mnist",
)
SCENARIOS = ("task", "domain", "class", "permuted")


def rows(batch: Batch) -> set[bytes]:
    return {x.numpy().tobytes() for x in batch.x}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """120 training and 24 test examples of 6 classes; each x is different."""
    x = np.arange(144 * 4, dtype=np.float32).reshape(144, 4)
    y = np.arange(144) % 6
    np.savez(tmp_path / "a.npz", x_train=x[:120], y_train=y[:120], x_test=x[120:], y_test=y[120:])
    return tmp_path


# --- the four scenarios


@pytest.mark.parametrize("scenario", ["task", "class"])
@pytest.mark.parametrize("num_tasks", [1, 2, 5, 10])
def test_classes_are_cut_in_order_and_labels_kept(scenario, num_tasks):
    digits = benchmark("digits", scenario, num_tasks=num_tasks)
    assert (len(digits), digits.num_classes, digits.input_shape) == (num_tasks, 10, (1, 8, 8))
    assert (digits.name, digits.scenario) == ("digits", scenario)
    assert [task.id for task in digits] == list(range(1, num_tasks + 1))
    assert sum((task.classes for task in digits), ()) == tuple(range(10))
    for task in digits:
        for part in (task.train, task.test):
            assert part.y.unique().tolist() == list(task.classes)


def test_domains_share_the_labels_by_rank():
    digits, split = benchmark("digits", "domain"), benchmark("digits", "class")
    assert digits.num_classes == 2
    for task, original in zip(digits, split, strict=True):
        assert task.classes == (0, 1)
        assert torch.equal(task.train.x, original.train.x)
        assert torch.equal(task.train.y, original.train.y - original.classes[0])
        assert torch.equal(task.test.y, original.test.y % 2)


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_tasks_cover_the_data_once(scenario):
    train, test = readers.read_stream("digits", None)
    digits = benchmark("digits", scenario)
    for part, whole in (("train", train), ("test", test)):
        seen = torch.cat([getattr(task, part).x for task in digits])
        assert sorted(seen.flatten(1).tolist()) == sorted(whole.x.flatten(1).tolist())
    assert not rows(digits.joint().train) & rows(digits.joint().test)


def test_the_order_within_a_task_is_that_of_the_data(folder):
    for task in benchmark(folder, num_tasks=3):
        assert bool((task.train.x[1:, 0] > task.train.x[:-1, 0]).all())


def test_the_mask_leaves_each_label_the_classes_of_its_task():
    digits = benchmark("digits", "task")
    assert digits.mask.dtype == torch.bool
    assert torch.equal(digits.mask, torch.block_diag(*[torch.ones(2, 2)] * 5).bool())
    y, logits = torch.tensor([0, 5, 9]), torch.arange(30.0).reshape(3, 10)
    p = logits.masked_fill(~digits.mask[y], -torch.inf).softmax(1)
    assert [r.nonzero().flatten().tolist() for r in p] == [[0, 1], [4, 5], [8, 9]]
    assert all(benchmark("digits", s).mask is None for s in ("domain", "class", "permuted"))


def test_permuted_tasks_show_the_same_examples_in_another_order_of_pixels():
    digits = benchmark("digits", "permuted", num_tasks=3)
    train, test = readers.read_stream("digits", None)
    first, second, third = digits
    assert torch.equal(first.train.x, train.x)
    assert torch.equal(first.test.x, test.x)
    for task in digits:
        assert (task.classes, task.train.x.shape) == (tuple(range(10)), train.x.shape)
        assert torch.equal(task.train.y, train.y)
        for part, whole in ((task.train, train), (task.test, test)):
            assert torch.equal(part.x.flatten(1).sort().values, whole.x.flatten(1).sort().values)
    assert not torch.equal(second.train.x, third.train.x)
    # Training and test examples of a task are shuffled alike: whole columns move, none is torn.
    joint = torch.cat([train.x, test.x]).flatten(1)
    shown = torch.cat([second.train.x, second.test.x]).flatten(1)
    assert sorted(map(tuple, joint.T.tolist())) == sorted(map(tuple, shown.T.tolist()))


def test_the_seed_chooses_the_permutations_and_nothing_else():
    again = benchmark("digits", "permuted", num_tasks=2, seed=0).tasks[1].train.x
    one, other = (benchmark("digits", "permuted", num_tasks=2, seed=s).tasks[1] for s in (0, 1))
    assert torch.equal(one.train.x, again)
    assert not torch.equal(one.train.x, other.train.x)
    a, b = (benchmark("digits", "class", seed=s).joint() for s in (0, 1))
    assert torch.equal(a.train.x, b.train.x)
    assert torch.equal(a.test.x, b.test.x)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_joint_is_the_union_in_task_order(scenario):
    digits = benchmark("digits", scenario)
    joint = digits.joint()
    assert isinstance(joint, Task)
    assert (joint.id, joint.classes) == (5, tuple(range(digits.num_classes)))
    for part in ("train", "test"):
        whole: Batch = getattr(joint, part)
        assert torch.equal(whole.x, torch.cat([getattr(task, part).x for task in digits]))
        assert torch.equal(whole.y, torch.cat([getattr(task, part).y for task in digits]))


# --- validation


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_validation_never_touches_a_test_example(folder, scenario):
    real = benchmark(folder, scenario, num_tasks=3)
    held = benchmark(folder, scenario, num_tasks=3, validation=0.25)
    secret = {float(v) for v in real.joint().test.x.flatten()}
    for task, original in zip(held, real, strict=True):
        seen = {float(v) for part in (task.train, task.test) for v in part.x.flatten()}
        assert not seen & secret
        assert not rows(task.train) & rows(task.test)
        assert rows(task.train) | rows(task.test) == rows(original.train)
    total = sum(len(task.test.y) for task in held)
    assert total == (90 if scenario == "permuted" else 30)


def test_the_seed_chooses_the_validation_examples(folder):
    a, b, c = (benchmark(folder, num_tasks=3, validation=0.5, seed=s).joint() for s in (0, 0, 1))
    assert torch.equal(a.test.x, b.test.x)
    assert rows(a.test) != rows(c.test)


def test_all_scenarios_hold_the_same_validation_examples(folder):
    held = [benchmark(folder, s, num_tasks=3, validation=0.25).joint().test for s in SCENARIOS[:3]]
    assert rows(held[0]) == rows(held[1]) == rows(held[2])


# --- refusals


def test_classes_that_do_not_divide_are_refused_with_the_numbers_that_do():
    with pytest.raises(InputError, match=r"10 classes .* 4 equal groups; .* from 1, 2, 5, 10"):
        benchmark("digits", num_tasks=4)
    assert len(benchmark("digits", "permuted", num_tasks=4)) == 4


def test_names_and_ranges_are_checked(folder):
    with pytest.raises(UnknownNameError, match="no scenario 'clas'; choose one of: task, domain"):
        benchmark("digits", "clas")
    with pytest.raises(UnknownNameError, match="no stream 'digit'"):
        benchmark("digit")
    with pytest.raises(InputError, match="num_tasks >= 1, got 0"):
        benchmark("digits", num_tasks=0)
    for validation in (-0.1, 1.0, float("nan")):
        with pytest.raises(InputError, match=r"fraction in \[0, 1\)"):
            benchmark("digits", validation=validation)
    with pytest.raises(InputError, match=r"0.001 of 120 training examples is 0"):
        benchmark(folder, num_tasks=3, validation=0.001)
    with pytest.raises(InputError, match=r"task \d .* has no (training|test) example"):
        benchmark(folder, num_tasks=6, validation=0.01)


def test_labels_with_a_gap_are_refused(tmp_path):
    x, y = np.ones((4, 2), np.float32), np.array([0, 1, 3, 3])
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(InputError, match=r"no training example has label 2 .* return_inverse=True"):
        benchmark(tmp_path, num_tasks=1)


def test_a_test_label_that_is_never_trained_is_refused(tmp_path):
    x = np.ones((4, 2), np.float32)
    y = np.array([0, 1, 1, 0])
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y + 1)
    with pytest.raises(InputError, match=r"test set has label 2, the training set only 0 .. 1"):
        benchmark(tmp_path, num_tasks=1)


def test_a_folder_can_be_named_by_text_or_by_path(folder):
    assert benchmark(str(folder), num_tasks=3).name == folder.name
    assert benchmark(folder, num_tasks=3).input_shape == (4,)


# --- the real thing


@needs_fashion
def test_fashion_mnist_splits_into_five_tasks_of_12000():
    start = time.perf_counter()
    fashion = benchmark("fashion_mnist", "class")
    seconds = time.perf_counter() - start
    assert (fashion.name, fashion.num_classes, fashion.input_shape) == (
        "fashion_mnist", 10, (1, 28, 28),
    )  # fmt: skip
    assert [len(task.train.y) for task in fashion] == [12_000] * 5
    assert [len(task.test.y) for task in fashion] == [2_000] * 5
    assert 0.0 <= float(fashion.tasks[0].train.x.min()) < float(fashion.tasks[0].train.x.max()) <= 1
    # It takes about one second; ten allow for a busy machine and still catch a Python loop.
    assert seconds < 10


@needs_fashion
def test_fashion_mnist_pixels_are_those_of_the_file():
    train, _ = readers.read_stream("fashion_mnist", None)
    raw = readers.read_idx(readers.FASHION_MNIST / "train-images-idx3-ubyte.gz")
    assert torch.equal(train.x[:50].mul(255).round().to(torch.uint8)[:, 0], torch.tensor(raw[:50]))
