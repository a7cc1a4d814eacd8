"Packaging shim: every value lives in settings.ini; the pocket world of data/pocket and the files of data/papers travel inside."
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=["="])
ini.read("settings.ini", encoding="utf-8")
c = ini["DEFAULT"]
lib, world, papers = c["lib_path"], f"{c['lib_path']}.pocket_world", f"{c['lib_path']}.paper_files"
atlas = f"{lib}.atlas_files"

setup(
    name=c["lib_name"], version=c["version"], description=c["description"], keywords=c["keywords"],
    author=c["author"], author_email=c["author_email"], license="Apache-2.0", url=c["git_url"],
    project_urls={"Documentation": c["doc_host"] + c["doc_baseurl"]},
    python_requires=">=" + c["min_python"],
    classifiers=["Programming Language :: Python :: 3", "Intended Audience :: Science/Research", "Typing :: Typed"],
    packages=[*find_packages(include=[lib, lib + ".*"]), world, papers, atlas],
    package_dir={world: "data/pocket", papers: "data/papers", atlas: "data/atlas"},
    package_data={lib: ["static/*", "py.typed"], world: ["*", "*/*"], papers: ["*.yaml"], atlas: ["*", "*/*"]},
    install_requires=shlex.split(c["requirements"]),
    extras_require={
        extra: shlex.split(c[f"{extra}_requirements"]) for extra in ("parallel", "lora", "kge", "onnx", "dask", "ray", "dev")
    },
    long_description=Path("README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    entry_points={"console_scripts": c["console_scripts"].split("\n"), "nbdev": [f"{lib}={lib}._modidx:d"]},
)
