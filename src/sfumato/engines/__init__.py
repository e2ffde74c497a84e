"""Where a federated round runs."""
