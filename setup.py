"Installs `modnb` from `settings.ini`, the one place where its name, version and requirements are written."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent / "settings.ini")
project = config["DEFAULT"]
extras = {name: project[f"{name}_requirements"].split() for name in ("data", "onnx", "lab", "dev")}
extras["lab"] += extras["data"]
extras["dev"] += extras["lab"] + extras["onnx"]

setup(
    name=project["lib_name"],
    version=project["version"],
    description=project["description"],
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=project["author"],
    author_email=project["author_email"],
    url=project["git_url"],
    license="Apache-2.0",
    keywords=project["keywords"],
    packages=find_packages(include=["modnb", "modnb.*"]),
    include_package_data=True,
    package_data={"modnb": project["package_data"].split()},
    python_requires=f">={project['min_python']}",
    install_requires=project["requirements"].split(),
    extras_require=extras,
    entry_points={"nbdev": ["modnb=modnb._modidx:d"], "console_scripts": project["console_scripts"].split()},
    zip_safe=False,
)
