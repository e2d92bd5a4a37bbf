"""`python -m ggml_diffusion` is the command line."""

from ggml_diffusion.app.cli.main import main

if __name__ == "__main__":
    main()
