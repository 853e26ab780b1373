"""How many of tuned AdamW's steps, and of its seconds, does each optimizer need? Fifteen tasks, equal budgets.

    python -m benchmarks.battery --config configs/battery/all.yaml

Every finished run is a line of a log; the same command goes on after the last one and writes the table at the end.
"""

from benchmarks.battery.battery import main

if __name__ == "__main__":
    main()
