"""Runs foreign verbs programs on the soft device and prints one table. Called by ci/foreign.sh."""
import glob, gzip, os, re, shutil, subprocess, sys, tempfile, time

SOFT = os.path.abspath(sys.argv[1])
LONG = "--long" in sys.argv
ONLY = [a for a in sys.argv[2:] if not a.startswith("-")]
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


def pair(name, command, limit=60, tail=(), environment=None, server_only=()):
    """The same command as server and as client; both must end with status 0."""
    global port
    if not wanted(name):
        return
    port += 1
    begin = time.monotonic()
    base = command + ["-p", str(port)]
    server = start(base + list(server_only), environment=environment)
    end = time.monotonic() + 10
    while not listening(port) and server.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    client = start(base + ["127.0.0.1", *tail], environment=environment)
    client_code, client_output = finish(client, limit)
    server_code, server_output = finish(server, 10 if client_code == 0 else 2)
    seconds = time.monotonic() - begin
    if client_code == 0 and server_code == 0 and "mismatch" not in client_output + server_output:
        row(name, "ok", seconds, figure(client_output))
    else:
        row(name, "FAILED", seconds, f"client {client_code}, server {server_code}")
        print_tail("client", client_output)
        print_tail("server", server_output)


def single(name, command, expect, limit=30):
    if not wanted(name):
        return
    begin = time.monotonic()
    code, output = finish(start(command), limit)
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
                    pair(f"{name} -a", base + ["-a", "-n", "100" if not LONG else "1000"], limit=120)
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


def capture():
    """The packets of a run, judged by tshark and by an independent computation of the ICRC."""
    name = "capture: dissected by tshark, every ICRC valid"
    if not wanted(name):
        return
    begin = time.monotonic()
    files = [os.path.join(OUT, f"{side}.pcap") for side in ("server", "client")]
    global port
    port += 1
    command = ["ibv_rc_pingpong", "-d", "soft0", "-g", "1", "-n", "200", "-s", "10000", "-p", str(port)]
    server = start(command, ["--pcap", files[0]])
    while not listening(port) and server.poll() is None:
        time.sleep(0.01)
    client = start(command + ["127.0.0.1"], ["--pcap", files[1]])
    codes = [finish(client, 60)[0], finish(server, 10)[0]]
    problems = [f"exit codes {codes}"] if codes != [0, 0] else []
    packets = 0
    for file in files:
        dissected = subprocess.run(["tshark", "-r", file, "--disable-heuristic", "rpcordma_infiniband", "-T", "fields", "-e",
                                    "infiniband.bth.opcode", "-e", "_ws.malformed"], capture_output=True, text=True)
        rows = [line.split("\t") for line in dissected.stdout.splitlines()]
        if not rows or any(not r[0] for r in rows):
            problems.append(f"{os.path.basename(file)}: not all packets dissect as InfiniBand")
        if any(len(r) > 1 and r[1] for r in rows):
            problems.append(f"{os.path.basename(file)}: malformed packets")
        checked = subprocess.run(["/usr/bin/python3", os.path.join(HERE, "check-icrc.py"), file], capture_output=True, text=True)
        if checked.returncode != 0:
            problems.append(checked.stdout.strip() + checked.stderr.strip())
        packets += len(rows)
    row(name, "FAILED" if problems else "ok", time.monotonic() - begin, "; ".join(problems) or f"{packets} packets")


for part in (utilities, perftest, capture, pyverbs):
    part()
print(f"{passed} passed, {failed} failed, {skipped} skipped")
if not failed:
    shutil.rmtree(OUT)
sys.exit(bool(failed) or not passed)
