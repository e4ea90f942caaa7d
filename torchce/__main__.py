"""``python -m torchce``: what is installed, as a table.

Its row ``cuda status`` says whether there are CUDA kernels. Why none were built is said while building, which pip shows
with ``-v`` only.
"""

from __future__ import annotations

from torchce import build_info


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


def main() -> None:
    info = build_info()
    width = max(map(len, info))
    for name, value in info.items():
        print(f"{name.replace('_', ' '):<{width}}  {_cell(value)}")


if __name__ == "__main__":
    main()
