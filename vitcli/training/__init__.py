"""What the loop of train.py is made of: an update, its gradients, its account, and what may go wrong with it."""
