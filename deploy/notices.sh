#!/bin/sh
# Writes the licences of all that is linked into `dtc`. See `--help`.

set -eu

usage() {
    cat <<'HELP'
usage: notices.sh DIRECTORY

Writes into DIRECTORY what must accompany a binary of dtc:

  LICENSE-MIT, LICENSE-APACHE  the licences of dtc
  THIRD-PARTY.txt              the crates that are linked into it, with all licence and copyright texts
                               in their packages; a text that several crates share is there once
  RUST-LIBRARY.html            the same for Rust's standard library
  MUSL.txt                     the same for the C library, if the compiler links musl

Run it in the repository where the binary was built, on the machine that built it: it reads the sources
that cargo compiled, and needs no network. It fails if a crate has no such text; then copy the text from
the crate's repository into deploy/licences, in a file named like the crate.
HELP
}

case ${1-} in
    --help)
        usage
        exit 0
        ;;
    '' | -*)
        usage >&2
        exit 2
        ;;
esac

to=$1
texts=$(mktemp -d)
trap 'rm -rf -- "$texts"' EXIT

# The crates that are linked, one a line: name, version, licence, repository. What runs in the compiler
# only is not linked.
cargo tree --locked --offline --edges normal,no-proc-macro --prefix none --format '{p}|{l}|{r}|' >"$texts/tree"
sed -n 's/^\([^ ]*\) v\([^ |]*\)|\([^|]*\)|\([^|]*\)|.*/\1|\2|\3|\4/p' "$texts/tree" | sort -u >"$texts/crates"

# texts_of DIRECTORY: the files with licences and copyrights of a crate, and of sources that it includes.
texts_of() {
    find "$1" -type f ! -name '*.rs' \( -iname 'licen[cs]e*' -o -iname 'unlicense*' -o \
        -iname 'copying*' -o -iname 'copyright*' -o -iname 'notice*' \) | sort
}

: >"$texts/order"
missing=
while IFS='|' read -r name version _ _; do
    own=deploy/licences/$name
    found=
    for directory in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/"$name-$version"; do
        if [ -d "$directory" ]; then found=$(texts_of "$directory"); fi
    done
    if [ -z "$found" ] && [ -e "$own" ]; then found=$own; fi
    if [ -z "$found" ]; then missing="$missing $name-$version"; fi
    printf '%s\n' "$found" | while IFS= read -r file; do
        [ -n "$file" ] || continue
        tr -d '\r' <"$file" >"$texts/text"
        sum=$(sha256sum <"$texts/text")
        sum=${sum%% *}
        if [ ! -e "$texts/$sum" ]; then
            mv -- "$texts/text" "$texts/$sum"
            echo "$sum" >>"$texts/order"
        fi
        echo "$name $version" >>"$texts/$sum.crates"
    done
done <"$texts/crates"
if [ -n "$missing" ]; then
    echo "notices.sh: no licence text is in the package of, nor in deploy/licences for:$missing" >&2
    exit 1
fi

library=$(rustc --print sysroot)/share/doc/rust/COPYRIGHT-library.html
if [ ! -e "$library" ]; then
    echo "notices.sh: the compiler has no $library: install it by rustup" >&2
    exit 1
fi

mkdir -p -- "$to"
cp -- LICENSE-MIT LICENSE-APACHE "$to"
cp -- "$library" "$to/RUST-LIBRARY.html"
if rustc -vV | grep -q '^host: .*-musl'; then cp -- deploy/licences/musl "$to/MUSL.txt"; fi
{
    echo 'dtc is linked with these crates:'
    echo
    while IFS='|' read -r name version licence repository; do
        echo "$name $version, $licence, $repository"
    done <"$texts/crates"
    while IFS= read -r sum; do
        printf '\n%s\n' '--------------------------------------------------------------------------------'
        uniq "$texts/$sum.crates" | awk '{ printf "%s%s", (NR > 1 ? ", " : ""), $0 } END { print ":" }' | fold -s -w 80
        echo
        cat -- "$texts/$sum"
    done <"$texts/order"
} >"$to/THIRD-PARTY.txt"
