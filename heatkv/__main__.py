"""`python -m heatkv` and the `heatkv` script: the command line, stopped cleanly even while torch is still loading."""

import os
import sys


def _keep_output() -> None:
    """Send what libraries in C print, as HiGHS does now and then, to the error stream: the output is for results."""
    if sys.stdout is not None:
        sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
        os.dup2(2, 1)


def main() -> None:
    """Run the command line; always ends the process."""
    try:
        _keep_output()
        from heatkv.cli import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        print("heatkv: stopped", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
