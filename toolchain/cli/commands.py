"""The commands in the order in which ``--help`` lists them, each with its one-line help."""

COMMANDS: dict[str, str] = {
    "build": "Build a recipe into a release of verified bundles.",
    "run": "Run a bundle on .npy, .npz, image or JSON inputs.",
    "serve": "Serve bundles over REST and gRPC (Open Inference Protocol).",
    "export": "Write a bundle in the form that another server loads (Triton, KServe, ...).",
    "inspect": "Show what a release or bundle holds, promises and measured.",
    "verify": "Check a bundle's digests and outputs, or that a recipe reproduces.",
    "sign": "Sign a release, as cosign does.",
    "push": "Send a release to an OCI registry.",
    "pull": "Bring a release out of an OCI registry.",
    "diff": "Compare two releases or bundles.",
    "tune": "Search for better tiles than the rules', and record them beside the recipe.",
    "why": "Say why each stage of a recipe would run or not.",
    "targets": "List target profiles, or explain one.",
    "cache": "Show the size of the stage cache, or prune it.",
    "init": "Write a recipe, a Makefile fragment and a CI workflow for a model.",
    "doctor": "Say what this machine can build, run and measure.",
}
