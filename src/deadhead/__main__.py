"""`python -m deadhead`, and so `torchrun -m deadhead` and `accelerate launch -m deadhead`."""

from deadhead.cli import main

if __name__ == "__main__":
    main()
