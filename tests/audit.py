"""Licences and known vulnerabilities of all that is installed: `make audit`, or `python tests/audit.py --help`.

Two tools say them, in an environment of their own: `pip-licenses` from what the packages say of themselves, `pip-audit`
from what the package index says of their versions. `pip-audit` passes over a package that the index does not know, and
says at the end that it found nothing; so it is counted how many it got an answer for."""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAMILIES = {"GPL": "GPL|GNU", "MPL": "MPL|Mozilla", "Apache": "Apache", "BSD": "BSD", "MIT": "MIT", "ISC": "ISC",
            "PSF": "PSF|Python Software Foundation"} # the first that fits, those that ask for more first
COPYLEFT = ("GPL", "MPL", "other")


def family(licence: str) -> str: # key of `FAMILIES`, or "other"
    return next((name for name, words in FAMILIES.items() if re.search(words, licence)), "other")


def plain(name: str) -> str: return re.sub("[-_.]+", "-", name).lower() # as the package index compares them


def installed() -> dict[str, str]: # name -> version, of all but this package and pip
    found = {plain(one.metadata["Name"]): one.version for one in distributions()}
    return {name: found[name] for name in sorted(found) if name not in ("modnb", "pip", "setuptools", "wheel")}


def licences(tools: Path) -> dict[str, str]: # name -> licence, as the package says it, in a line
    words = [tools / "pip-licenses", f"--python={sys.executable}", "--format=json", "--from=mixed",
             "--with-system", "--with-license-file", "--no-license-path"]
    said = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    text = lambda row: row["LicenseText"].strip().splitlines()[:1] if row["License"] == "UNKNOWN" else [row["License"]]
    return {plain(row["Name"]): "".join(text(row)) for row in said}


def vulnerabilities(tools: Path, pins: dict[str, str]) -> dict: # how many are known to the index, and what it says
    with tempfile.TemporaryDirectory() as folder:
        asked, said = Path(folder, "pins.txt"), Path(folder, "said.json")
        asked.write_text("".join(f"{name}=={version.partition('+')[0]}\n" for name, version in pins.items()))
        words = [tools / "pip-audit", "--no-deps", "--disable-pip", "-r", asked, "-f", "json", "-o", said]
        ran = subprocess.run(words, capture_output=True, text=True)
        if not said.exists(): return {"asked": len(pins), "answered": 0, "error": ran.stderr.strip()[-200:]}
        found = json.loads(said.read_text())["dependencies"]
    known = [one for one in found if "skip_reason" not in one]
    return {"asked": len(pins), "answered": len(known),
            "found": {one["name"]: [each["id"] for each in one["vulns"]] for one in known if one["vulns"]}}


def count(said: dict[str, str], names: Iterable[str]) -> dict[str, int]: # family -> packages, most first
    return dict(Counter(family(said.get(plain(name), "")) for name in names).most_common())


def main() -> int: # 1 where a vulnerability is known
    parser = argparse.ArgumentParser(description="Licences and known vulnerabilities of what is installed.")
    parser.add_argument("--tools", type=Path, help="folder with pip-licenses and pip-audit (an environment is made)")
    parser.add_argument("--write", type=Path, help="write what was found there, as JSON")
    options = parser.parse_args()
    slim = json.loads((ROOT / "results/hard_use/slim.json").read_text())["pip install modnb"]["names"]
    with tempfile.TemporaryDirectory() as folder:
        if not (tools := options.tools):
            tools = Path(folder, "bin")
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            install = [tools / "python", "-m", "pip", "install", "--quiet", "pip-licenses", "pip-audit"]
            subprocess.run(install, check=True)
        pins, said = installed(), licences(tools)
        known = vulnerabilities(tools, pins)
    beside = [name for name in slim if name != "modnb"]
    found = {"date": f"{datetime.now(UTC):%Y-%m-%d}",
             "licences": {"pip install modnb": count(said, beside), "pip install 'modnb[dev]'": count(said, pins)},
             "to be read": {name: text for name, text in said.items() if name in pins and family(text) in COPYLEFT},
             "vulnerabilities": known}
    print(json.dumps(found, indent=1))
    if options.write: options.write.write_text(json.dumps(found, indent=1) + "\n")
    if known["answered"] < known["asked"]:
        print(f"nothing is known of {known['asked'] - known['answered']} packages", file=sys.stderr)
    return int(bool(known.get("found")))


if __name__ == "__main__": sys.exit(main())
