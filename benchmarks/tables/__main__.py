"""Rewrite README.md."""

from __future__ import annotations

from benchmarks.tables import README, filled


def main() -> None:
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
