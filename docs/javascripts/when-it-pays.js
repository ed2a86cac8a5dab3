"use strict";
// The table of docs/when-it-pays.md: what is the best way to run a network, for a device, a link and a budget.
(() => {
  const root = document.getElementById("when-it-pays");
  const { columns, budgets, models, downlink_ratio, least_gain } = JSON.parse(document.getElementById("ways").textContent);
  const [LATENCY, STREAM] = ["latency", "throughput"];
  // As the planner's own map has it: 61 rates of the uplink and 41 slow-downs, both logarithmic.
  const ACROSS = 61, UP = 41, RATES = [-1, 2], SLOWER = [0, 2];
  const LINKS = { "3G": [1.1, 200], "LTE": [5.85, 60], "Wi-Fi": [18.88, 20] };
  const GROUPS = {
    trained: "With trained weights, and codecs that lose a little",
    today: "Networks of today, with codecs that lose nothing",
    paper: "As the paper's authors measured them in 2015",
  };
  const SOURCES = {
    trained: "The server is one core of an x86-64 processor. A device that is 1× slower is as fast as that.",
    today: "The server is one core of an x86-64 processor. A device that is 1× slower is as fast as that. The weights " +
      "are random, which changes no times, but some of the compressed sizes.",
    paper: "The server is a Tesla K40. A device that is 1× slower is as fast as the GPU of a Tegra K1. Tensors cross as " +
      "they are.",
  };
  const BUDGET_TEXTS = {
    "lossless": "none: what crosses keeps every bit",
    "as measured": "3 %, as measured on photographs",
    "surely": "3 %, with 95 % confidence",
  };
  const RUNTIMES = {
    "eager": "eager PyTorch", "onnxruntime": "ONNX Runtime where that is quicker", "as published": "what the paper used",
  };
  const settings = {
    model: Object.keys(models)[0], goal: LATENCY, budget: "as measured", runtime: "eager", slow: 10, uplink: 5.85, trip: 60,
  };

  // ---- the arithmetic of the planner ------------------------------------------------------------------------------

  for (const model of Object.values(models)) {
    for (const [runtime, rows] of Object.entries(model.rows)) {
      model.rows[runtime] = rows.map((values) => {
        const row = Object.fromEntries(columns.map((column, i) => [column, values[i]]));
        row.kind = row.index === 0 ? "server" : row.index === model.layers ? "device" : "cut";
        return row;
      });
    }
  }

  // The seconds that each part of an inference takes. The answer's way back counts like the request's.
  function parts(row, s) {
    const device = s.slow * row.device_s;
    if (row.kind === "device") return { device, up: 0, server: 0, down: 0, trip: 0 };
    const rate = 1e6 * s.uplink;
    return {
      device, up: (8 * row.size_bytes) / rate, server: row.server_s,
      down: (8 * models[s.model].answer_bytes) / (rate * downlink_ratio), trip: s.trip / 1e3,
    };
  }

  // The same added up, or of a stream the slowest of them. It is asked for every row at every place of the map.
  function cost(row, s, answer_bytes) {
    const device = s.slow * row.device_s;
    if (row.kind === "device") return device;
    const rate = 1e6 * s.uplink, up = (8 * row.size_bytes) / rate, down = (8 * answer_bytes) / (rate * downlink_ratio);
    return s.goal === LATENCY ? device + up + row.server_s + down + s.trip / 1e3 :
      Math.max(device, up, row.server_s, down);
  }

  // The best way of each kind, and of all. Of equal ones the first, which does least on the device.
  function decide(s) {
    const level = budgets.indexOf(s.budget), best = {}, { rows, answer_bytes } = models[s.model];
    for (const row of rows[s.runtime]) {
      if (row.budget > level) continue;
      const takes = cost(row, s, answer_bytes);
      if (!best[row.kind] || takes < best[row.kind].takes) best[row.kind] = { row, takes };
    }
    const end = best.device.takes < best.server.takes ? best.device : best.server;
    const gain = best.cut && best.cut.takes < end.takes ? end.takes / best.cut.takes : 1;
    return { ...best, end, gain, splits: gain >= least_gain, best: gain >= least_gain ? best.cut : end };
  }

  // ---- words ------------------------------------------------------------------------------------------------------

  const digits = (value) => String(Number(value.toPrecision(3)));
  const seconds = (value) => (value >= 1 ? `${digits(value)} s` : `${digits(value * 1e3)} ms`);
  const bytes = (value) => (value >= 1e6 ? `${digits(value / 1e6)} MB` : `${digits(value / 1e3)} kB`);
  const times = (value) => `${value >= 10 ? digits(value) : value.toFixed(2)}×`;

  function codec(name) {
    if (name === "raw") return "as it is";
    const [kind, rest] = name.split(", ");
    if (kind === "fitted") return `by a codec fitted to this cut, ${rest}`;
    const known = {
      "zstd": "compressed by zstd", "png": "as PNG", "webp-lossless": "as lossless WebP",
      "int8+zstd": "in 8 bits a value and zstd", "int4+zstd": "in 4 bits a value and zstd",
    }[kind];
    return known ?? `as ${name}`;
  }

  function place(row, s) {
    if (row.kind === "device") return "everything on the device";
    if (row.kind === "server") return "everything on the server";
    return `cut ${row.where} (layer ${row.index} of ${models[s.model].layers})`;
  }

  function verdict(found, s) {
    const { row } = found.best, other = found.end === found.device ? found.server : found.device;
    const beside = (gain, end) => (s.goal === LATENCY ?
      `An answer takes ${seconds(found.best.takes)}, ${times(gain)} as fast as with ${place(end.row, s)}` :
      `An answer comes every ${seconds(found.best.takes)}, ${times(gain)} as often as with ${place(end.row, s)}`);
    if (found.splits) {
      return [`Split it: ${place(row, s)}`,
        `${bytes(row.size_bytes)} cross, ${codec(row.codec)}. ${beside(found.gain, found.end)}, the better of both ends.`];
    }
    const sent = row.kind === "server" ? ` The input crosses ${codec(row.codec)}, ${bytes(row.size_bytes)}.` : "";
    const near = found.gain > 1 ? ` The best cut gains less than ${Math.round(100 * (least_gain - 1))} % more.` : "";
    return [`Do not split it: ${place(row, s)}`, `${beside(other.takes / found.best.takes, other)}.${sent}${near}`];
  }

  // ---- the controls -----------------------------------------------------------------------------------------------

  const make = (tag, options = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(options)) {
      if (key in made) made[key] = value;
      else made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  };

  function select(key, label, choices) {
    const chosen = make("select", { id: `ways-${key}` }, ...choices);
    chosen.addEventListener("change", () => set({ [key]: chosen.value }));
    return make("div", { className: "ways-control" }, make("label", { htmlFor: chosen.id, textContent: label }), chosen);
  }

  const option = (value, text) => make("option", { value, textContent: text });
  const groups = Object.entries(GROUPS).map(([source, label]) => make("optgroup", { label },
    ...Object.keys(models).filter((name) => models[name].source === source).map((name) => option(name, name)))
  ).filter((group) => group.childElementCount);

  // A slider: from its position to the setting, and back.
  const SLIDERS = {
    slow: { label: "Device, times slower", min: 0, max: 2, step: 0.05, log: true, text: (value) => `${digits(value)}×` },
    uplink: { label: "Uplink", min: -1, max: 2, step: 0.05, log: true, text: (value) => `${digits(value)} Mbit/s` },
    trip: { label: "Round trip", min: 0, max: 300, step: 5, log: false, text: (value) => `${digits(value)} ms` },
  };

  function slider(key) {
    const { label, min, max, step, log } = SLIDERS[key];
    const range = make("input", { type: "range", id: `ways-${key}`, min, max, step });
    range.addEventListener("input", () => set({ [key]: log ? 10 ** range.valueAsNumber : range.valueAsNumber }));
    const shown = make("output", { id: `ways-${key}-shown`, htmlFor: range.id });
    const caption = make("label", { htmlFor: range.id, textContent: label });
    return make("div", { className: "ways-control" }, make("span", {}, caption, " ", shown), range);
  }

  const presets = make("div", { className: "ways-control", role: "group", "aria-label": "A link by its name" },
    make("strong", { textContent: "A link by its name" }),
    make("span", {}, ...Object.entries(LINKS).map(([name, [uplink, trip]]) => {
      const button = make("button", { type: "button", textContent: name });
      button.addEventListener("click", () => set({ uplink, trip }));
      return button;
    })));

  const canvas = make("canvas", { id: "ways-plane", role: "img" });
  const legend = make("ul", { className: "ways-legend" });
  const headline = make("p", { className: "ways-headline" }), detail = make("p", {});
  const result = make("div", { id: "ways-result", role: "status" }, headline, detail);
  const body = make("tbody", {});
  const takesHeading = make("th", { scope: "col" });
  const table = make("table", { className: "ways-table" },
    make("thead", {}, make("tr", {}, make("th", { scope: "col", textContent: "way" }), takesHeading,
      ...["device", "link", "server", "sent"].map((text) => make("th", { scope: "col", textContent: text })))), body);
  const note = make("p", { className: "ways-note" }), caption = make("figcaption", {});
  root.replaceChildren(
    make("div", { className: "ways-controls" },
      select("model", "Network", groups),
      select("goal", "What counts", [option(LATENCY, "one at a time: the answer's latency"),
        option(STREAM, "a stream: answers a second")]),
      select("budget", "Answers that may change", Object.entries(BUDGET_TEXTS).map((entry) => option(...entry))),
      select("runtime", "Both sides run by", []),
      slider("slow"), slider("uplink"), slider("trip"), presets),
    result, make("div", { className: "ways-scroll" }, table), note, make("figure", {}, canvas, legend, caption));

  const find = (id) => document.getElementById(id);

  function set(changed) {
    Object.assign(settings, changed);
    const { rows } = models[settings.model], runtimes = Object.keys(rows);
    const runtime = runtimes.includes(settings.runtime) ? settings.runtime : runtimes[0];
    // Where no codec that loses anything was measured, only one budget is of use.
    const lossless = rows[runtime].every((row) => row.budget === 0);
    const used = { ...settings, runtime, budget: lossless ? budgets[0] : settings.budget };
    find("ways-runtime").replaceChildren(...runtimes.map((name) => option(name, RUNTIMES[name])));
    find("ways-runtime").disabled = runtimes.length === 1;
    find("ways-budget").disabled = lossless;
    for (const key of ["model", "goal", "budget", "runtime"]) find(`ways-${key}`).value = used[key];
    for (const [key, { log, text }] of Object.entries(SLIDERS)) {
      const range = find(`ways-${key}`), value = text(settings[key]);
      range.value = log ? Math.log10(settings[key]) : settings[key];
      range.setAttribute("aria-valuetext", value);
      find(`ways-${key}-shown`).textContent = value;
    }
    show(used);
  }

  function show(s) {
    const found = decide(s);
    [headline.textContent, detail.textContent] = verdict(found, s);
    Object.assign(result.dataset, {
      kind: found.best.row.kind, index: found.best.row.index, codec: found.best.row.codec, takes: found.best.takes,
      device: found.device.takes, server: found.server.takes, cut: found.cut.takes, gain: found.gain,
    });
    takesHeading.textContent = s.goal === LATENCY ? "answer takes" : "an answer every";
    body.replaceChildren(...[found.cut, found.device, found.server].map(({ row, takes }) => {
      const { device, up, server, down, trip } = parts(row, s);
      const on = s.goal === LATENCY ? up + down + trip : Math.max(up, down), none = row.kind === "device";
      const way = row.kind === "device" ? place(row, s) : `${place(row, s)}, ${codec(row.codec)}`;
      const cells = [seconds(takes), seconds(device), none ? "–" : seconds(on), none ? "–" : seconds(server),
        none ? "–" : bytes(row.size_bytes)];
      return make("tr", { className: row === found.best.row ? "ways-best" : "" },
        make("th", { scope: "row", textContent: row === found.best.row ? `★ ${way}` : way }),
        ...cells.map((text) => make("td", { textContent: text })));
    }));
    note.textContent = SOURCES[models[s.model].source];
    draw(s);
  }

  // Draws the map before the next frame is shown, however often it is asked for until then.
  let drawn = settings, waits = false;
  function draw(s) {
    drawn = s;
    if (waits) return;
    waits = true;
    requestAnimationFrame(() => {
      waits = false;
      paint(drawn);
    });
  }

  // ---- the map ----------------------------------------------------------------------------------------------------

  const STEPS = [[1.02, "#c7e9c0"], [1.2, "#8fd08b"], [1.5, "#4fb063"], [2, "#238443"], [3, "#00572b"]];
  const MARGIN = { left: 46, right: 10, top: 8, bottom: 38 };
  const dark = () => document.body.getAttribute("data-md-color-scheme") === "slate";
  const colors = () => (dark() ? { device: "#8b93a1", server: "#d98a3d" } : { device: "#d9d9d9", server: "#f7b977" });
  const along = ([low, high], i, count) => 10 ** (low + ((high - low) * i) / (count - 1));

  function plane(s) {
    const cells = [];
    for (let j = 0; j < UP; j++) {
      for (let i = 0; i < ACROSS; i++) {
        const { gain, splits, best } = decide({ ...s, slow: along(SLOWER, j, UP), uplink: along(RATES, i, ACROSS) });
        cells.push({ i, j, gain, kind: splits ? "cut" : best.row.kind });
      }
    }
    return cells;
  }

  function paint(s) {
    const width = canvas.parentElement.clientWidth, height = Math.round(Math.min(380, Math.max(260, width * 0.6)));
    const ratio = window.devicePixelRatio || 1, ends = colors();
    Object.assign(canvas, { width: width * ratio, height: height * ratio });
    Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const box = { x: MARGIN.left, y: MARGIN.top, w: width - MARGIN.left - MARGIN.right, h: height - MARGIN.top - MARGIN.bottom };
    // On whole pixels, so that no seams show between cells.
    const left = (i) => Math.round(box.x + (box.w * i) / ACROSS), top = (j) => Math.round(box.y + (box.h * (UP - 1 - j)) / UP);
    const at = (i, j) => [left(i), top(j)];
    const cells = plane(s);
    for (const { i, j, gain, kind } of cells) {
      pen.fillStyle = kind === "cut" ? STEPS.findLast(([least]) => gain >= least)[1] : ends[kind];
      pen.fillRect(left(i), top(j), left(i + 1) - left(i), top(j - 1) - top(j));
    }
    const ink = getComputedStyle(canvas).color, place = (value, [low, high]) => (Math.log10(value) - low) / (high - low);
    pen.font = "12px system-ui, sans-serif";
    pen.fillStyle = ink;
    pen.textAlign = "center";
    const middle = (share, w, count) => ((share * (count - 1) + 0.5) / count) * w;
    for (const rate of [0.1, 1, 10, 100]) pen.fillText(String(rate), box.x + middle(place(rate, RATES), box.w, ACROSS), box.y + box.h + 15);
    pen.fillText("uplink, Mbit/s", box.x + box.w / 2, height - 5);
    pen.textAlign = "right";
    for (const slow of [1, 3, 10, 30, 100]) pen.fillText(`${slow}×`, box.x - 5, box.y + box.h - middle(place(slow, SLOWER), box.h, UP) + 4);
    pen.save();
    pen.translate(11, box.y + box.h / 2);
    pen.rotate(-Math.PI / 2);
    pen.textAlign = "center";
    pen.fillText("device, times slower", 0, 0);
    pen.restore();
    label(pen, cells, at, box);
    const x = box.x + middle(place(s.uplink, RATES), box.w, ACROSS);
    const y = box.y + box.h - middle(place(s.slow, SLOWER), box.h, UP);
    for (const [size, color] of [[6, "#fff"], [3.5, "#c2185b"]]) {
      pen.beginPath();
      pen.arc(x, y, size, 0, 2 * Math.PI);
      pen.fillStyle = color;
      pen.fill();
    }
    describe(cells, ends);
  }

  // Names the parts of the map, so that it can be read without telling its colors apart.
  function label(pen, cells, at, box) {
    pen.textAlign = "center";
    pen.fillStyle = "#111";
    for (const [kind, text] of [["device", "device"], ["server", "server"], ["cut", "split"]]) {
      const own = cells.filter((cell) => cell.kind === kind);
      if (own.length < 0.06 * cells.length) continue;
      const mean = (axis) => own.reduce((sum, cell) => sum + cell[axis], 0) / own.length;
      const [i, j] = [mean("i"), mean("j")];
      // The mean of a bent part may lie outside of it; the nearest of its cells does not.
      const near = own.reduce((a, b) => (Math.hypot(b.i - i, b.j - j) < Math.hypot(a.i - i, a.j - j) ? b : a));
      const [x, y] = at(near.i, near.j);
      pen.fillText(text, Math.min(Math.max(x, box.x + 22), box.x + box.w - 22), Math.max(y + 8, box.y + 14));
    }
  }

  function describe(cells, ends) {
    const count = (kind) => cells.filter((cell) => cell.kind === kind).length / cells.length;
    const most = Math.max(...cells.map((cell) => cell.gain)), share = count("cut");
    const percent = (value) => `${Math.round(100 * value)} %`;
    Object.assign(canvas.dataset, { share, most });
    caption.textContent = share > 0 ?
      `Splitting is the best in ${percent(share)} of this map, and up to ${times(most)} as good as the better end.` :
      "Splitting is the best nowhere on this map: one of both ends is.";
    canvas.setAttribute("aria-label", `Map of the best way over uplink and slow-down of the device. ${caption.textContent} ` +
      `Everything on the device: ${percent(count("device"))}, everything on the server: ${percent(count("server"))}.`);
    const steps = STEPS.map(([least, color], k) => [
      `split, ${k + 1 < STEPS.length ? `${least} to ${STEPS[k + 1][0]}×` : `from ${least}×`}`, color]);
    legend.replaceChildren(...[["device", ends.device], ["server", ends.server], ...steps].map(([text, color]) => {
      const swatch = make("span", { className: "ways-swatch" });
      swatch.style.background = color;
      return make("li", {}, swatch, text);
    }));
  }

  canvas.addEventListener("click", (event) => {
    const frame = canvas.getBoundingClientRect();
    const share = (value, low, size) => Math.min(Math.max((value - low) / size, 0), 1);
    const across = share(event.clientX - frame.x, MARGIN.left, frame.width - MARGIN.left - MARGIN.right);
    const up = share(frame.bottom - event.clientY, MARGIN.bottom, frame.height - MARGIN.top - MARGIN.bottom);
    const cell = (value, count) => Math.min(Math.floor(value * count), count - 1);
    set({ uplink: along(RATES, cell(across, ACROSS), ACROSS), slow: along(SLOWER, cell(up, UP), UP) });
  });
  window.addEventListener("resize", () => draw(drawn));
  new MutationObserver(() => draw(drawn)).observe(document.body, { attributeFilter: ["data-md-color-scheme"] });
  set({});
})();
