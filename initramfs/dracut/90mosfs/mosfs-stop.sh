#!/bin/sh
# What follows a boot that failed: CONFIG/on-failure says it (docs/boot.md), never the kernel command line.
#
#   mosfs-stop --allows-shell   exit 0 where there may be a root shell, else 1
#   mosfs-stop                  restart or halt this machine; it does not return

on_failure=
[ ! -r /etc/mosfs/on-failure ] || read -r on_failure < /etc/mosfs/on-failure
if [ "$1" = --allows-shell ]; then
    [ "$on_failure" = shell ]
    exit
fi
trap '' INT TSTP QUIT HUP TERM
case "$on_failure" in
    halt)
        echo "mosfs: this machine halts" > /dev/console
        halt -f -f || echo o > /proc/sysrq-trigger
        ;;
    *)
        echo "mosfs: this machine restarts in 5 seconds" > /dev/console
        sleep 5
        reboot -f -f || echo b > /proc/sysrq-trigger
        ;;
esac
# Neither worked: nothing else may happen here.
while :; do
    sleep 60
done
