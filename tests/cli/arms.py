"""What the command-line tests put in place of the central [training] section."""

from __future__ import annotations

FEDERATED = {"mode": "federated", "algorithm": "fedsgd", "learning_rate": 0.5}
