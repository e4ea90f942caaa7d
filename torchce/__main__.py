"""``python -m torchce``: what is installed, as a table."""

from __future__ import annotations

from torchce import build_info


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return {True: "yes", False: "no", None: "-"}.get(value, str(value)) if not isinstance(value, str) else value  # type: ignore[call-overload, no-any-return]


def main() -> None:
    info = build_info()
    width = max(map(len, info))
    for name, value in info.items():
        print(f"{name.replace('_', ' '):<{width}}  {_cell(value)}")


if __name__ == "__main__":
    main()
