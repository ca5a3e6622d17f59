#!/usr/bin/env python3
"""What lies beside a release's binary: a wheel that installs it, and the list of what is inside (CycloneDX 1.5).

    python3 scripts/release_files.py VERSION FOLDER     FOLDER holds `ares` and the metadata.json of `cargo metadata`

Standard library alone; called by release.sh.
"""

import base64
import hashlib
import json
import sys
import zipfile
from pathlib import Path

NAME, TAG = "ares_repair", "py3-none-manylinux_2_28_x86_64"


def wheel(version, folder):
    """A wheel with one script, the binary, and its manual."""
    info = f"{NAME}-{version}.dist-info"
    files = {
        f"{NAME}-{version}.data/scripts/ares": (folder / "ares").read_bytes(),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {NAME.replace('_', '-')}\nVersion: {version}\nLicense: Apache-2.0\n"
                            "Summary: Finds where a policy and its reward model fail together, and repairs both\n".encode(),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: release_files\nRoot-Is-Purelib: false\nTag: {TAG}\n".encode(),
    }
    files |= {f"{NAME}-{version}.data/data/share/man/man1/{page.name}": page.read_bytes() for page in sorted((folder / "man").iterdir())}
    digest = lambda data: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    record = "".join(f"{name},sha256={digest(data)},{len(data)}\n" for name, data in files.items()) + f"{info}/RECORD,,\n"
    files[f"{info}/RECORD"] = record.encode()
    with zipfile.ZipFile(folder / f"{NAME}-{version}-{TAG}.whl", "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))  # the same bytes whenever it is made
            mode = 0o755 if "/scripts/" in name else 0o644
            # A regular file: pip makes nothing else executable.
            entry.external_attr, entry.compress_type = (0o100000 | mode) << 16, zipfile.ZIP_DEFLATED
            out.writestr(entry, data)


def contents(metadata):
    """Every crate that is linked in: those reachable without development's and the build's dependencies."""
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    packages = {package["id"]: package for package in metadata["packages"]}
    seen, open_ = set(), [metadata["resolve"]["root"]]
    while open_:
        node = open_.pop()
        if node not in seen:
            seen.add(node)
            normal = lambda dep: any(kind["kind"] is None for kind in dep["dep_kinds"])
            open_ += [dep["pkg"] for dep in nodes[node]["deps"] if normal(dep)]
    return sorted((packages[id] for id in seen), key=lambda package: (package["name"], package["version"]))


def main():
    version, folder = sys.argv[1], Path(sys.argv[2])
    wheel(version, folder)
    component = lambda p: {"type": "library", "name": p["name"], "version": p["version"], "purl": f"pkg:cargo/{p['name']}@{p['version']}",
                           "licenses": [{"expression": (p["license"] or "unknown").replace("/", " OR ")}]}
    crates = [component(p) for p in contents(json.loads((folder / "metadata.json").read_text())) if p["name"] != "ares"]
    sbom = {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
            "metadata": {"component": {"type": "application", "name": "ares", "version": version}}, "components": crates}
    (folder / "sbom.json").write_text(json.dumps(sbom, indent=1) + "\n")
    print(f"{len(crates)} crates inside")


main()
