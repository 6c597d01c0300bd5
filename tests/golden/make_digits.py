"""Make `src/tessera/data/bundled/digits.npz` from a scikit-learn wheel.

pip download --no-deps scikit-learn==1.9.1 -d wheel
python tests/golden/make_digits.py wheel/scikit_learn-*.whl
"""

import gzip
import io
import sys
import zipfile
from pathlib import Path

import numpy as np

TARGET = Path(__file__).parents[2] / "src/tessera/data/bundled/digits.npz"


def main(wheel: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = gzip.decompress(archive.read("sklearn/datasets/data/digits.csv.gz"))
    # Each line: 64 pixels in 0 .. 16, row by row, then the digit.
    table = np.loadtxt(io.BytesIO(text), delimiter=",")
    assert table.shape == (1797, 65), table.shape
    rows = table.astype(np.uint8)
    assert (rows == table).all(), "a value is not a whole number below 256"
    assert rows[:, :64].max() == 16, "the pixels go from 0 to 16"
    # numpy dates every member 1980, so the same table gives the same bytes (for one zlib).
    np.savez_compressed(TARGET, x=rows[:, :64].reshape(-1, 8, 8), y=rows[:, 64])
    print(f"{TARGET}: {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
