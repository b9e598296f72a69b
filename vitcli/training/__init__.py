"""What the loop of train.py works with: its setup, an update, its account, what becomes of the weights."""
