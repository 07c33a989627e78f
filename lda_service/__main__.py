"""`python -m lda_service` is `lda-service`."""

from lda_service.cli import main

if __name__ == "__main__":
    main()
