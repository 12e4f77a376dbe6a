"""What the ops of a program take on a folded cluster: one file for each sort, over the placement that all share."""
