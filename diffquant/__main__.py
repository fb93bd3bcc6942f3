"""`python -m diffquant` is `diffquant`."""

from diffquant.cli import main

if __name__ == "__main__":
    main()
