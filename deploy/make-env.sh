#!/usr/bin/env bash
# Random passwords for compose.yaml and kubernetes/, once, into deploy/.env, which git and docker build do not see.
set -euo pipefail
file=$(dirname "$0")/.env
if [ -e "$file" ]; then
    echo "$file is there already" >&2
    exit 0
fi
random() { head -c 24 /dev/urandom | base64 | tr -d '+/='; }
umask 077
cat > "$file" << END
POSTGRES_PASSWORD=$(random)
AWS_ACCESS_KEY_ID=$(random)
AWS_SECRET_ACCESS_KEY=$(random)
END
