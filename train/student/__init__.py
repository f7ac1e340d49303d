"""What a run trains: the model that it begins with, its family, and adapters in it."""
