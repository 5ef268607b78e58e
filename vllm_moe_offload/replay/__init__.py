"""A recorded routing trace, served again without the model."""
