"""Recipes by name: each is a function without arguments that returns a `Recipe`."""

from vicinal.recipes.book import find, names

__all__ = ["find", "names"]
