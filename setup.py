"""The packages of the wheel; everything else is in pyproject.toml.

The configurations lie in the folder ``configs`` of the repository, where people look for them. Setuptools installs
them inside the package, so that ``lowrank fit -c best`` finds them. pyproject.toml can't say so beside packages that
setuptools finds by itself.
"""

from setuptools import find_packages, setup

CONFIGS = "lowrank_pl.configs"

setup(
    packages=[*find_packages(include=["lowrank_pl*"]), CONFIGS],
    package_dir={CONFIGS: "configs"},
    package_data={"lowrank_pl": ["py.typed", "*.pyi", "report/templates/*"], CONFIGS: ["**/*.yaml"]},
)
