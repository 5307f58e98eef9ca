"""The recipes, installed as the package `deadhead.recipes`, so that the commands find them without a checkout."""
