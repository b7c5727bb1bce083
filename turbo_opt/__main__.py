"""`python -m turbo_opt`: the same as the `turbo-opt` command."""

from turbo_opt.cli.main import main

if __name__ == "__main__":
    main()
