#!/bin/sh
# need.sh PACKAGE TEST: make sure that the Debian package whose presence TEST shows is there.
# Installs it as root where there is apt; otherwise says in one line what to install.
package=$1
test=$2
sh -c "$test" >/dev/null 2>&1 && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing the system package $package"
  apt-get install -y -q "$package" >/dev/null 2>&1 ||
    { apt-get update -q >/dev/null 2>&1 && apt-get install -y -q "$package" >/dev/null; } || exit 1
  sh -c "$test" >/dev/null 2>&1 && exit 0
fi
echo "adamix needs the system package $package: sudo apt-get install $package" >&2
exit 1
