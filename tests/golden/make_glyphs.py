"""Make `src/tessera/data/bundled/glyphs.npz` from the fonts of Debian's fonts-noto-core.

apt install fonts-noto-core && pip install pillow==13.0.0
python tests/golden/make_glyphs.py
"""

import hashlib
from pathlib import Path

import numpy as np

from tessera.data.glyph_build import ARRAYS, build_glyphs

TARGET = Path(__file__).parents[2] / "src/tessera/data/bundled/glyphs.npz"


def digest(path: Path) -> str:
    """Of what is in the arrays: the file's bytes depend on the zlib that packed them."""
    held = hashlib.sha256()
    with np.load(path) as arrays:
        for name in ARRAYS:
            a = arrays[name]
            held.update(f"{name} {a.dtype.str} {a.shape}".encode() + a.tobytes())
    return held.hexdigest()


def main() -> None:
    TARGET.unlink(missing_ok=True)
    build_glyphs(TARGET, per_script=20)
    print(f"{TARGET}: {TARGET.stat().st_size} bytes, arrays {digest(TARGET)}")


if __name__ == "__main__":
    main()
