"""`python -m heatkv` and the `heatkv` script: the command line, stopped cleanly even while torch is still loading."""

import sys


def main() -> None:
    """Run the command line; always ends the process."""
    try:
        from heatkv.cli import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        print("heatkv: stopped", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
