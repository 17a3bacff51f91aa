"""Speed and memory beside other engines. A regular package: Opacus installs one of the same name, which would win."""
