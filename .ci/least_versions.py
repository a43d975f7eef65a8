"""Print the lowest versions that pyproject.toml allows, as pip takes them."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]
for wanted in project["dependencies"] + project["optional-dependencies"]["cli"]:
    name, version = re.fullmatch(r"([\w-]+)>=([\d.]+)", wanted).groups()
    # "1" stands for 1.0, not for the latest 1.x
    print(f"{name}=={version}")
