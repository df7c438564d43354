#!/bin/sh
# Takes root=mosfs and root=mosfs:TARGET; what else the command line says is read by `mosfs boot`.

case "$root" in
    mosfs | mosfs:*)
        # shellcheck disable=SC2034
        rootok=1
        ;;
esac
