#!/bin/sh
# modprobe, as `vfioctl run` has it: the modules of VFIO are vfiod's here, there from the start and
# for good. Anything else is the real one's.
real=/dev/.vfioctl/modprobe

ours() {
    case $1 in
        vfio | vfio[-_]* | iommufd | mdev | mtty | mdpy) ;;
        char-major-10-196 | devname:vfio/vfio | devname:iommu) ;;
        *) return 1 ;;
    esac
}

many='' remove='' value='' first='' foreign=''
for word; do
    if [ "$value" ]; then
        value=''
        continue
    fi
    case $word in
        -C | -d | -S | --config | --dirname | --set-version) value=yes ;;
        --all) many=yes ;;
        --remove) many=yes remove=yes ;;
        --*) ;;
        -*)
            case $word in *[ar]*) many=yes ;; esac
            case $word in *r*) remove=yes ;; esac
            ;;
        *)
            # Without -a and -r, what follows the module's name are its parameters.
            if [ -z "$first" ] || [ "$many" ]; then
                first=${first:-$word}
                ours "$word" || foreign=yes
            fi
            ;;
    esac
done
if [ -z "$first" ] || { [ "$foreign" ] && [ -z "$many" ]; }; then
    exec "$real" "$@"
fi
if [ "$remove" ] && ours "$first"; then
    echo "modprobe: FATAL: Module $first is in use: it is vfiod's" >&2
    exit 1
fi
[ "$foreign" ] || exit 0
for word; do
    shift
    ours "$word" || set -- "$@" "$word"
done
exec "$real" "$@"
