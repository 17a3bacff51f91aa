"""What is trained: which parameters, chosen by what, and adapters of a low rank."""
