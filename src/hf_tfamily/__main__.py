"""`python -m hf_tfamily` is the command `hf-tfamily`."""

from hf_tfamily_cli import main

if __name__ == "__main__":
    main()
