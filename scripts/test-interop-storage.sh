#!/usr/bin/env bash
# Runs the suites of storage and checkpoints against other people's servers: moto (S3) and Azurite
# (Azure Blob Storage; storage only), both from their package registries into .pollen/, both on
# loopback and in memory. Needs python3 with venv and node with npm. POLLEN_SKIP_AZURITE=1 or
# POLLEN_SKIP_MOTO=1 leaves one out, and says so. Google Cloud Storage has no server that runs
# offline: gs:// is not tested here.
set -euo pipefail

checkout=$(cd "$(dirname "$0")/.." && pwd)
tools=$checkout/.pollen/interop
moto_version=5.2.5
azurite_version=3.37.0
blob_client_version=12.34.0
log=$tools/log
mkdir -p "$tools"
servers=()
trap 'for server in "${servers[@]}"; do kill "$server" 2>/dev/null || true; done' EXIT

fail() {
    printf 'test-interop-storage: %s\n' "$*" >&2
    exit 1
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# Waits until a port answers.
await() {
    for _ in $(seq 150); do
        (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null && return 0
        sleep 0.2
    done
    tail -n 5 "$log" >&2
    fail "$2 does not answer on port $1"
}

# The storage's conformance suite, and with it the checkpoints': fencing of orphans, lost answers.
suite() {
    "${CARGO:-cargo}" test --locked --workspace --features pollen-cli/faults --test conformance -- "$@"
}

if [[ ${POLLEN_SKIP_MOTO:-} == 1 ]]; then
    echo 'SKIPPED: S3 on moto (POLLEN_SKIP_MOTO=1)'
else
    if [[ $("$tools/moto/bin/python" -c 'import moto; print(moto.__version__)' 2>/dev/null) != "$moto_version" ]]; then
        python3 -m venv "$tools/moto"
        "$tools/moto/bin/pip" install --quiet --disable-pip-version-check "moto[server,s3]==$moto_version" ||
            fail "pip could not install moto $moto_version: check the network, or set POLLEN_SKIP_MOTO=1"
    fi
    port=$(free_port)
    "$tools/moto/bin/moto_server" -H 127.0.0.1 -p "$port" >"$log" 2>&1 &
    servers+=($!)
    await "$port" moto
    python3 -c 'import sys, urllib.request as u; u.urlopen(u.Request(sys.argv[1], method="PUT"))' \
        "http://127.0.0.1:$port/pollen-test"
    AWS_ENDPOINT_URL=http://127.0.0.1:$port AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test \
        AWS_REGION=us-east-1 POLLEN_TEST_S3_URL=s3://pollen-test/conformance suite
fi

if [[ ${POLLEN_SKIP_AZURITE:-} == 1 ]]; then
    echo 'SKIPPED: Azure on Azurite (POLLEN_SKIP_AZURITE=1)'
else
    if [[ ! -f $tools/node_modules/azurite/package.json ]]; then
        npm install --silent --no-audit --no-fund --prefix "$tools" \
            "azurite@$azurite_version" "@azure/storage-blob@$blob_client_version" ||
            fail "npm could not install azurite $azurite_version: check the network, or set POLLEN_SKIP_AZURITE=1"
    fi
    port=$(free_port)
    "$tools/node_modules/.bin/azurite-blob" --blobHost 127.0.0.1 --blobPort "$port" --inMemoryPersistence \
        --skipApiVersionCheck --disableTelemetry --silent >"$log" 2>&1 &
    servers+=($!)
    await "$port" Azurite
    # Azurite's well-known account; the container has to be there before the suite.
    (cd "$tools" && node -e '
        const { BlobServiceClient } = require("@azure/storage-blob");
        const key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";
        const url = `http://127.0.0.1:${process.argv[1]}/devstoreaccount1`;
        BlobServiceClient.fromConnectionString(
            `DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey=${key};BlobEndpoint=${url};`
        ).getContainerClient("pollen-test").create().catch((e) => { console.error(e.message); process.exit(1); });
    ' "$port")
    AZURE_STORAGE_USE_EMULATOR=true AZURITE_BLOB_STORAGE_URL=http://127.0.0.1:$port \
        POLLEN_TEST_AZURE_URL=az://pollen-test/conformance suite azure
fi
