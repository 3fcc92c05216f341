"""Runs foreign verbs programs on the soft device and prints one table. Called by ci/foreign.sh."""
import glob, gzip, os, re, shutil, subprocess, sys, tempfile, time

SOFT = os.path.abspath(sys.argv[1])
DROP_IN = os.path.abspath(sys.argv[2])
LONG = "--long" in sys.argv
ONLY = [a for a in sys.argv[3:] if not a.startswith("-")]
HERE = os.path.dirname(os.path.abspath(__file__))
OUT = tempfile.mkdtemp(prefix="foreign-")
passed = failed = skipped = 0
port = 18600


def row(name, verdict, seconds, detail=""):
    global passed, failed, skipped
    passed += verdict == "ok"
    failed += verdict == "FAILED"
    skipped += verdict == "skipped"
    print(f"{name:<58} {verdict:<8} {seconds:6.1f} s  {detail}", flush=True)


def wanted(name):
    return not ONLY or any(word in name for word in ONLY)


def soft(command, options=()):
    return [SOFT, "run", *options, "--", *command]


def listening(number):
    want = f":{number:04X}"
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table) as rows:
            for line in rows:
                fields = line.split()
                if fields[1].endswith(want) and fields[3] == "0A":
                    return True
    return False


def finish(process, limit):
    try:
        output, _ = process.communicate(timeout=limit)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        return "timeout", output


def start(command, options=(), environment=None):
    env = dict(os.environ, **(environment or {}))
    return subprocess.Popen(soft(command, options), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, errors="replace", env=env)


def pair(name, command, limit=60, options=()):
    """The same command as server and as client; both must end with status 0."""
    global port
    if not wanted(name):
        return
    port += 1
    begin = time.monotonic()
    base = command + ["-p", str(port)]
    server = start(base, options)
    end = time.monotonic() + 10
    while not listening(port) and server.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    client = start(base + ["127.0.0.1"], options)
    client_code, client_output = finish(client, limit)
    server_code, server_output = finish(server, 10 if client_code == 0 else 2)
    seconds = time.monotonic() - begin
    if client_code == 0 and server_code == 0 and "mismatch" not in client_output + server_output:
        row(name, "ok", seconds, figure(client_output))
    else:
        row(name, "FAILED", seconds, f"client {client_code}, server {server_code}")
        print_tail("client", client_output)
        print_tail("server", server_output)


def single(name, command, expect, limit=30, options=()):
    if not wanted(name):
        return
    begin = time.monotonic()
    code, output = finish(start(command, options), limit)
    seconds = time.monotonic() - begin
    missing = [text for text in expect if text not in output]
    if code == 0 and not missing:
        row(name, "ok", seconds)
    else:
        row(name, "FAILED", seconds, f"status {code}, missing {missing}")
        print_tail("output", output)


def print_tail(who, output):
    for line in output.strip().splitlines()[-12:]:
        print(f"    {who}: {line}")


def figure(output):
    """The one figure of a run worth a place in the table."""
    match = re.search(r"iters in [\d.]+ seconds = ([\d.]+) usec/iter", output)
    if match:
        return f"{match.group(1)} us an iteration"
    lines = [line.split() for line in output.splitlines() if re.match(r"^\s*\d+\s+\d+\s+[\d.]+", line)]
    if not lines:
        return ""
    last = lines[-1]
    if "t_typical" in output:
        return f"{last[0]} B: typical {last[4]} us"
    if "BW average" in output:
        return f"{last[0]} B: {last[3]} MB/s"
    return ""


def utilities():
    single("ibv_devices", ["ibv_devices"], ["soft0"])
    single("ibv_devinfo -v", ["ibv_devinfo", "-v", "-d", "soft0"], ["PORT_ACTIVE", "Ethernet", "RoCE v2", "::ffff:127."])
    n = ["-n", "500"]
    for program in ("rc", "uc", "ud", "srq"):
        tool = f"ibv_{program}_pingpong"
        check = ["-c"] if program in ("rc", "srq") else []
        common = [tool, "-d", "soft0", "-g", "1"]
        pair(f"{tool}", common + n)
        pair(f"{tool} -e", common + n + ["-e"])
        sizes = ["1", "1000", "2000"] if program == "ud" else ["1", "4097", "65536"]
        for size in sizes:
            pair(f"{tool} -s {size} {' '.join(check)}".rstrip(), common + n + ["-s", size] + check)
    pair("ibv_rc_pingpong -t (timestamps)", ["ibv_rc_pingpong", "-d", "soft0", "-g", "1", "-t"] + n)
    pair("ibv_rc_pingpong -N (new post API)", ["ibv_rc_pingpong", "-d", "soft0", "-g", "1", "-N"] + n)
    pair("ibv_rc_pingpong -o (ODP)", ["ibv_rc_pingpong", "-d", "soft0", "-g", "1", "-o"] + n)
    pair("ibv_rc_pingpong -m 256 -s 100000 -c", ["ibv_rc_pingpong", "-d", "soft0", "-g", "1", "-m", "256", "-s", "100000", "-c"] + n)


def perftest():
    transports = {"send": ["RC", "UC", "UD"], "write": ["RC", "UC"], "read": ["RC"], "atomic": ["RC"]}
    for verb, kinds in transports.items():
        for kind in kinds:
            for measure in ("lat", "bw"):
                tool = f"ib_{verb}_{measure}"
                base = [tool, "-d", "soft0", "-x", "1", "-F", "-c", kind]
                iterations = ["-n", "1000"]
                name = f"{tool} -c {kind}"
                pair(name, base + iterations)
                pair(f"{name} --use_old_post_send", base + iterations + ["--use_old_post_send"])
                if verb == "send" or verb == "read":
                    pair(f"{name} -e", base + iterations + ["-e"])
                if verb != "atomic":
                    pair(f"{name} -a", base + ["-a", "-n", "200" if LONG else "20" if measure == "lat" else "100"],
                         limit=600 if LONG else 120)
                if measure == "bw":
                    pair(f"{name} -q 8", base + iterations + ["-q", "8"])
    pair("ib_send_bw -b (both ways)", ["ib_send_bw", "-d", "soft0", "-x", "1", "-F", "-b", "-n", "1000"])
    pair("ib_write_bw -b (both ways)", ["ib_write_bw", "-d", "soft0", "-x", "1", "-F", "-b", "-n", "1000"])
    pair("ib_atomic_lat -A CMP_AND_SWAP", ["ib_atomic_lat", "-d", "soft0", "-x", "1", "-F", "-A", "CMP_AND_SWAP", "-n", "1000"])
    pair("ib_send_lat -r 128 --use-srq", ["ib_send_lat", "-d", "soft0", "-x", "1", "-F", "-n", "1000", "-r", "128", "--use-srq"])


def verdicts(output):
    """Each test's verdict in unittest's verbose output, where a test may print lines of its own before it."""
    results = {}
    heads = list(re.finditer(r"^(test_\w+) \((tests\.[\w.]+)\)", output, re.M))
    for head, following in zip(heads, heads[1:] + [None]):
        text = output[head.end():following.start() if following else len(output)]
        verdict = re.search(r"(?:\.\.\. |^)(ok|skipped|FAIL|ERROR)\b", text, re.M)
        test, where = head.groups()
        results[where if where.endswith(test) else f"{where}.{test}"] = verdict.group(1) if verdict else "no verdict"
    return results


def pyverbs():
    name = "pyverbs (rdma-core's own test suite)"
    if not wanted(name):
        return
    source = "/usr/share/doc/rdma-core/tests"
    if not os.path.isdir(source):
        row(name, "skipped", 0, f"{source} is not installed")
        return
    folder = os.path.join(OUT, "tests")
    shutil.copytree(source, folder)
    for packed in glob.glob(os.path.join(folder, "*.gz")):
        with gzip.open(packed) as data, open(packed[:-3], "wb") as plain:
            shutil.copyfileobj(data, plain)
    begin = time.monotonic()
    process = subprocess.Popen(soft(["/usr/bin/python3", os.path.join(folder, "run_tests.py"), "--dev", "soft0", "-v"]),
                               cwd=OUT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, errors="replace")
    code, output = finish(process, 300)
    with open(os.path.join(OUT, "pyverbs.txt"), "w") as log:
        log.write(output)
    results = verdicts(output)
    counts = {verdict: sum(v == verdict for v in results.values()) for verdict in ("ok", "skipped", "FAIL", "ERROR")}
    with open(os.path.join(HERE, "pyverbs-ok-on-rxe.txt")) as lines:
        reference = [line.strip() for line in lines if not line.startswith("#")]
    lost = [test for test in reference if results.get(test) != "ok"]
    bad = len(results) - counts["ok"] - counts["skipped"]
    print(f"pyverbs: {counts['ok']} ok, {bad} failed, {counts['skipped']} skipped "
          f"(the kernel's rxe: {len(reference)} ok; of these {len(reference) - len(lost)} are ok here)")
    for test in lost:
        print(f"    ok on rxe, here {results.get(test, 'not run')}: {test}")
    for test, verdict in results.items():
        if verdict not in ("ok", "skipped"):
            print(f"    {verdict}: {test}")
    verdict = "ok" if code == 0 and not lost and not bad and results else "FAILED"
    row(name, verdict, time.monotonic() - begin, f"{counts['ok']} ok; log {OUT}/pyverbs.txt" if verdict != "ok" else f"{counts['ok']} ok")


def judge(file, least):
    """What tshark and an independent computation of the ICRC say against a capture; its packets."""
    problems = []
    # What tshark would guess of payloads that have nothing to do with these protocols.
    guesses = ["--disable-heuristic", "rpcrdma_infiniband", "--disable-heuristic", "eth_over_ib"]
    dissected = subprocess.run(["tshark", "-r", file, *guesses, "-Y", "udp.dstport == 4791", "-T", "fields", "-e",
                                "infiniband.bth.opcode", "-e", "_ws.malformed", "-e", "_ws.expert.severity"],
                               capture_output=True, text=True, timeout=60)
    rows = [line.split("\t") for line in dissected.stdout.splitlines()]
    if dissected.returncode != 0:
        problems.append(f"tshark: {dissected.stderr.strip()}")
    if len(rows) < least:
        problems.append(f"{len(rows)} packets where {least} were expected")
    if any(not opcode for opcode, _, _ in rows):
        problems.append("not all packets dissect as InfiniBand")
    # Severities are numbers; this one is an error's.
    wrong = [row for row in rows if row[1] or str(0x800000) in row[2].split(",")]
    if wrong:
        problems.append(f"{len(wrong)} packets are malformed")
    checked = subprocess.run(["/usr/bin/python3", os.path.join(HERE, "check-icrc.py"), file], capture_output=True, text=True, timeout=60)
    if checked.returncode != 0:
        problems.append(checked.stdout.strip() + checked.stderr.strip())
    return [f"{os.path.basename(file)}: {problem}" for problem in problems], len(rows)


def captured(name, command, least, wire=False):
    """A run whose packets are captured: by the device on both sides, or on the loopback interface."""
    if not wanted(name):
        return
    global port
    begin = time.monotonic()
    port += 1
    command = command + ["-p", str(port)]
    files = [os.path.join(OUT, f"{port}-{side}.pcap") for side in (("wire",) if wire else ("server", "client"))]
    # Addresses of their own, for the interface carries what others send as well.
    ends = [f"127.{port // 256}.{port % 256}.{end}" for end in (1, 2)]
    options = [["--addr", end] for end in ends] if wire else [["--pcap", file] for file in files]
    environment = {"RDMA_SOFT_GSO": "off"} if wire else None
    if wire:
        dump = subprocess.Popen(["tcpdump", "-i", "lo", "-U", "-B", "65536", "-c", "10000", "-w", files[0],
                                 *f"udp dst port 4791 and src host ({ends[0]} or {ends[1]})".split()],
                                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        said = dump.stderr.readline()
        if "listening on" not in said:
            dump.kill()
            row(name, "skipped", 0, f"no capture on lo: {said.strip()}")
            return
    server = start(command, options[0], environment)
    while not listening(port) and server.poll() is None and time.monotonic() < begin + 10:
        time.sleep(0.01)
    client = start(command + ["127.0.0.1"], options[1], environment)
    codes = [finish(client, 60)[0], finish(server, 10)[0]]
    if wire:
        time.sleep(0.5)
        dump.terminate()
        finish(dump, 10)
    problems = [f"exit codes {codes}"] if codes != [0, 0] else []
    packets = 0
    for file in files:
        found, count = judge(file, least)
        problems += found
        packets += count
    row(name, "FAILED" if problems else "ok", time.monotonic() - begin, "; ".join(problems) or f"{packets} packets")


def captures():
    perf = ["-d", "soft0", "-x", "1", "-F", "-n", "100"]
    pingpong = ["-d", "soft0", "-g", "1", "-n", "100"]
    for name, command, least in (
        ("ibv_rc_pingpong -s 10000", ["ibv_rc_pingpong", *pingpong, "-s", "10000"], 600),
        ("ibv_uc_pingpong -s 10000", ["ibv_uc_pingpong", *pingpong, "-s", "10000"], 600),
        ("ibv_ud_pingpong", ["ibv_ud_pingpong", *pingpong], 200),
        ("ib_write_bw -s 5001", ["ib_write_bw", *perf, "-s", "5001"], 200),
        ("ib_write_lat -c UC", ["ib_write_lat", *perf, "-c", "UC"], 200),
        ("ib_read_lat -s 9999", ["ib_read_lat", *perf, "-s", "9999"], 300),
        ("ib_atomic_bw -A CMP_AND_SWAP", ["ib_atomic_bw", *perf, "-A", "CMP_AND_SWAP"], 200),
    ):
        captured(f"capture: {name}", command, least)
    captured("capture on the wire: ibv_rc_pingpong -s 10000", ["ibv_rc_pingpong", *pingpong, "-s", "10000"], 600, wire=True)


def version_nodes(library):
    notes = subprocess.run(["readelf", "-V", "-W", library], capture_output=True, text=True).stdout
    definitions = notes.partition("Version definition")[2].partition("Version needs")[0]
    return set(re.findall(r"Name: (IBVERBS_\S+)", definitions))


def symbols(file):
    """Names with versions that a library defines, and those that it imports."""
    table = subprocess.run(["readelf", "--dyn-syms", "-W", file], capture_output=True, text=True).stdout
    rows = [line.split() for line in table.splitlines()]
    rows = [fields for fields in rows if len(fields) > 7 and "@IBVERBS_" in fields[7].replace("@@", "@")]
    names = [(fields[6] == "UND", fields[7].replace("@@", "@")) for fields in rows]
    return {name for imported, name in names if not imported}, {name for imported, name in names if imported}


def drop_in():
    """The library in place of libibverbs.so.1."""
    ours = os.path.join(DROP_IN, "libibverbs.so.1")
    libraries = "/usr/lib/x86_64-linux-gnu" if os.path.isdir("/usr/lib/x86_64-linux-gnu") else "/usr/lib"
    name = "drop-in: version nodes"
    if wanted(name):
        missing = version_nodes(os.path.join(libraries, "libibverbs.so.1")) - version_nodes(ours)
        row(name, "FAILED" if missing else "ok", 0, f"missing {sorted(missing)}" if missing else "")
    name = "drop-in: imports of installed programs and libraries"
    if wanted(name):
        files = [file for pattern in (f"{libraries}/lib*.so.[0-9]", f"{libraries}/libibverbs/*.so", "/usr/bin/ib*", "/usr/bin/r*ping",
                                      "/usr/lib/python3/dist-packages/pyverbs/*.so") for file in glob.glob(pattern)]
        defined, count, problems = symbols(ours)[0], 0, []
        for file in files:
            imports = symbols(file)[1] if "libibverbs.so.1" not in file else set()
            count += bool(imports)
            if imports - defined:
                problems.append(f"{file}: {sorted(imports - defined)}")
        row(name, "FAILED" if problems or not count else "ok", 0, "; ".join(problems) or f"{count} files")
    loader = ("import ctypes, sys\n"
              "verbs, count = ctypes.CDLL('libibverbs.so.1', 2), ctypes.c_int()\n"
              "verbs.ibv_get_device_list(ctypes.byref(count))\n"
              "[ctypes.CDLL(name, 2) for name in ('libmlx5.so.1', 'libefa.so.1', 'librdmacm.so.1')]\n"
              "print('devices:', count.value)")
    options = ["--drop-in", DROP_IN]
    single("drop-in: dlopen, libmlx5, libefa, librdmacm bound", ["/usr/bin/python3", "-c", loader], ["devices: 1"], options=options)
    single("drop-in: ibv_devinfo -v", ["ibv_devinfo", "-v", "-d", "soft0"], ["PORT_ACTIVE", "::ffff:127."], options=options)
    pair("drop-in: ibv_rc_pingpong -c", ["ibv_rc_pingpong", "-d", "soft0", "-g", "1", "-n", "500", "-c"], options=options)
    pair("drop-in: ib_send_lat", ["ib_send_lat", "-d", "soft0", "-x", "1", "-F", "-n", "1000"], options=options)


for part in (utilities, perftest, drop_in, captures, pyverbs):
    part()
print(f"{passed} passed, {failed} failed, {skipped} skipped")
if not failed:
    shutil.rmtree(OUT)
sys.exit(bool(failed) or not passed)
