#!/bin/sh
# Counts the instructions of a request, user and kernel, on a machine without hardware counters: runs the servers and wrk
# in an emulated machine whose clock advances a nanosecond with each instruction, so that a process's CPU time is its
# number of instructions. README.md, "Emulated machine", says what differs from a real one.
#
#   guest.sh [-r ROUNDS] [-s SECONDS] [-p batch|other] [-k VMLINUZ] [SERVER:LOAD ...]
#
# SERVER is one of server_command() below (`ringleader@64` has 64 executors), LOAD a number of connections, with `p` for 16
# requests pipelined, with `c` for a connection per request. Debian, x86-64; as root it installs what is missing. Without -k
# the kernel is Debian's, unpacked and not installed.
set -eu

usage() {
    sed -n '6,10s/^# *//p' "$0" >&2
    exit 2
}

rounds=3
seconds=1
policy='batch'
kernel=''
while getopts r:s:p:k: flag; do
    case $flag in
    r) rounds=$OPTARG ;;
    s) seconds=$OPTARG ;;
    p) policy=$OPTARG ;;
    k) kernel=$OPTARG ;;
    *) usage ;;
    esac
done
shift $((OPTIND - 1))
case $policy in batch | other) ;; *) usage ;; esac
[ $# -gt 0 ] || set -- tokio:64 ringleader:64 bare:64 tokio:4 ringleader:4 bare:4

here=$(cd "$(dirname "$0")" && pwd)
bin=${BIN:-$here/../../target/release}
# The kernel's package is kept here; everything else is made anew.
kept=${KEPT:-$here/../../target/guest}
qemu='qemu-system-x86_64'

for tool in $qemu busybox cpio wrk; do
    command -v "$tool" >/dev/null && continue
    apt-get install -y --no-install-recommends qemu-system-x86 busybox-static cpio wrk util-linux
    break
done

mkdir -p "$kept"
if [ -z "$kernel$(find "$kept" -name 'vmlinuz-*')" ]; then
    # The package that the newest kernel for virtual machines is in.
    package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9]\S*\)/\1/p' | head -n 1)
    (cd "$kept" && apt-get download "$package" && dpkg-deb -x "$package"_*.deb .)
fi
[ -n "$kernel" ] || kernel=$(find "$kept" -name 'vmlinuz-*' | sort -V | tail -n 1)

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root/fs/bin" "$root/fs/proc" "$root/fs/sys" "$root/fs/dev" "$root/fs/tmp"
cp "$(command -v busybox)" "$(command -v wrk)" "$(command -v chrt)" "$root/fs/bin"
cp "$here/src/bin/bench-peers/pipelined.lua" "$root/fs"
echo 'wrk.headers["Connection"] = "close"' >"$root/fs/close.lua"
for server in ringleader peer-tokio peer-bare-ring peer-adapters peer-glommio; do
    [ -x "$bin/$server" ] || {
        echo "error: $bin/$server is not there. Build with cargo build --release --workspace, or set BIN" >&2
        exit 1
    }
    strip -o "$root/fs/bin/$server" "$bin/$server"
done
# Every library that any of them needs, and the loader, where they are here.
for library in $(ldd "$root"/fs/bin/* 2>/dev/null | grep -o '/[^ ]*\.so[^ ]*' | sort -u); do
    mkdir -p "$root/fs$(dirname "$library")"
    cp -L "$library" "$root/fs$library"
done
printf '%s\n' "rounds=$rounds" "seconds=$seconds" "policy=--$policy" "cases='$*'" >"$root/fs/settings"

cat >"$root/fs/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
ip link set lo up
ulimit -n 65536
ulimit -l unlimited
. /settings
# The firmware's last line has no end.
echo
port=20000

# As in bench-peers.
server_command() {
    at="--listen 127.0.0.1:$port --cpus 0"
    case $1 in
    ringleader) echo "ringleader serve $at --executors 1 --log warn" ;;
    ringleader@*) echo "ringleader serve $at --executors ${1#ringleader@} --log warn" ;;
    tokio) echo "peer-tokio $at --executors 1" ;;
    bare) echo "peer-bare-ring $at --executors 1" ;;
    glommio) echo "peer-glommio $at --executors 1" ;;
    tokio-*) echo "peer-tokio $at --through ${1#tokio-}" ;;
    ringleader-*) echo "peer-adapters $at --through ${1#ringleader-}" ;;
    esac
}

load_arguments() {
    case $1 in
    *p) echo "--connections ${1%p} --script /pipelined.lua" ;;
    *c) echo "--connections ${1%c} --script /close.lua" ;;
    *) echo "--connections $1" ;;
    esac
}

# Of all threads: CPU time, and how often one was given the CPU.
used() {
    cat /proc/"$1"/task/*/schedstat | awk '{ time += $1; turns += $3 } END { printf "%d %d", time, turns }'
}

# Prints the requests answered within so many seconds, the server's instructions and its turns.
load() {
    before=$(used "$pid")
    chrt $policy 0 wrk --threads 1 $(load_arguments "$1") --duration 60s "http://127.0.0.1:$port/" >/tmp/wrk 2>&1 &
    wrk=$!
    sleep "$2"
    kill -INT $wrk
    wait $wrk
    # Its last connections are closed then.
    sleep 0.02
    grep -E 'Socket errors|Non-2xx' /tmp/wrk >&2
    echo "$(awk '/ requests in /{ print $1 }' /tmp/wrk) $before $(used "$pid")" | awk '{ print $1 + 0, $4 - $2, $5 - $3 }'
}

measure() {
    server=${1%:*}
    connections=${1#*:}
    port=$((port + 1))
    chrt $policy 0 $(server_command "$server") >/tmp/said 2>&1 &
    pid=$!
    tries=0
    until grep -q "$(printf ':%04X 00000000:0000 0A' $port)" /proc/net/tcp; do
        tries=$((tries + 1))
        [ $tries -lt 100 ] || break
        sleep 0.05
    done
    # Twice, the second time for longer: in the difference, connecting and the first requests are not.
    short=$(load "$connections" 0.12)
    long=$(load "$connections" "$seconds")
    echo "RESULT $server $connections $short $long"
    sed 's/^/SAID /' /tmp/said
    kill $pid
    wait $pid 2>/dev/null
}

round=0
while [ $round -lt "$rounds" ]; do
    for case in $cases; do measure "$case"; done
    round=$((round + 1))
done
poweroff -f
INIT
chmod +x "$root/fs/init"
(cd "$root/fs" && find . | cpio --quiet -o -H newc >"$root/initramfs")

# One processor: with two, the clock of each would count what the other executes. `sleep=off`: the clock jumps to the next
# timer when all sleep. No `rep movsb` for copies: each byte would count as an instruction. No mitigations: an emulated
# processor would get those of old ones.
$qemu -nodefaults -no-reboot -nographic -serial stdio -m 1024 -cpu max,-erms,-fsrm -smp 1 \
    -accel tcg -icount shift=0,sleep=off -rtc base=2026-01-01,clock=vm \
    -kernel "$kernel" -initrd "$root/initramfs" \
    -append "console=ttyS0 quiet mitigations=off tsc=reliable clocksource=tsc nokaslr panic=-1" \
    </dev/null | tr -d '\r' | tee "$root/out" | sed -n '/^SAID/p; /^RESULT/s/^RESULT \([^ ]* [^ ]*\).*/# \1/p' >&2

echo "kernel ${kernel##*vmlinuz-}, $policy scheduling, $seconds s of $rounds rounds; instructions per request, user and kernel"
awk '
    $1 == "RESULT" && $7 > $4 {
        key = $3 " " $2
        value = ($8 - $5) / ($7 - $4)
        if (!(key in count)) order[++cases] = key
        count[key]++; sum[key] += value; answered[key] += $7; turns[key] += $9
        if (count[key] == 1 || value < least[key]) least[key] = value
        if (value > most[key]) most[key] = value
    }
    END {
        printf "%-11s %-20s %10s %10s %10s %9s %s\n", "connections", "server", "mean", "least", "most", "to tokio", "requests a turn"
        for (i = 1; i <= cases; i++) {
            key = order[i]; split(key, of, " ")
            against = of[1] (of[2] == "ringleader-axum" || of[2] == "tokio-axum-serve" ? " tokio-axum" : " tokio")
            if (!(against in count)) against = of[1] " tokio"
            ratio = against in count ? sprintf("%.3f", sum[key] / count[key] / (sum[against] / count[against])) : "-"
            printf "%-11s %-20s %10.0f %10.0f %10.0f %9s %.1f\n", of[1], of[2], sum[key] / count[key], least[key], most[key], ratio,
                turns[key] ? answered[key] / turns[key] : 0
        }
        exit cases == 0
    }' "$root/out"
