"""The bundled demo model: a small Llama with 24 blocks, trained by scripts/train_demo_model.py."""

from pathlib import Path

DEMO_MODEL: Path = Path(__file__).resolve().parent
DEMO_NAME = "swarm-demo"
