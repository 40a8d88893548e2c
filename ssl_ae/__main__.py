"""`python -m ssl_ae`, which torchrun needs."""

from ssl_ae.cli import main

if __name__ == "__main__":
    main()
