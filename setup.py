"""Where the packages lie: pyproject.toml can find those in src/ or map recipes/ to deadhead.recipes, but not both."""

from setuptools import find_packages, setup

setup(
    package_dir={"": "src", "deadhead.recipes": "recipes"},
    packages=[*find_packages("src"), "deadhead.recipes"],
)
