"""What can be known of a backdoor without its trigger: scores, their thresholds, and what they allow to be said."""
