"""`python -m llmrl.cli grpo ...`: what `accelerate launch -m` and `torchrun -m` start."""

from llmrl.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
