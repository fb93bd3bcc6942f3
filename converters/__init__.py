"""File to file converters, installed as `diffquant.converters`."""
