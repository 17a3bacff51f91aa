"""The clients' side: data and ledger, the live model, local training, answers."""
