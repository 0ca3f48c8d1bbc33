"""What every trainer here shares: models, losses, collators, checks, publishing and pictures."""
