"""Where the packages lie: pyproject.toml can map recipes/ to deadhead.recipes, or find the packages in src/, not both."""

from setuptools import find_packages, setup

setup(
    package_dir={"": "src", "deadhead.recipes": "recipes"},
    packages=[*find_packages("src"), "deadhead.recipes"],
)
