"""`python -m heatkv`: the same command line as the `heatkv` script."""

from heatkv.cli import main

if __name__ == "__main__":
    main()
