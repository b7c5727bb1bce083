"""Rewrite the pages that have tables."""

from __future__ import annotations

from benchmarks.tables import PAGES, filled


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
