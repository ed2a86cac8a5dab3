"use strict";
(() => {
  const data = JSON.parse(document.getElementById("plan").textContent);
  const { rows, frontiers, runs } = data;
  const codecs = Object.keys(frontiers);
  const [anyCodec] = codecs;
  const SLIDERS = [
    { key: "uplink_bit_s", label: "uplink", unit: "Mbit/s", scale: 1e6, low: 0.01, high: 10000, log: true },
    { key: "downlink_bit_s", label: "downlink", unit: "Mbit/s", scale: 1e6, low: 0.01, high: 10000, log: true },
    { key: "round_trip_s", label: "round trip", unit: "ms", scale: 1e-3, low: 0, high: 500, log: false },
    { key: "load", label: "server load", unit: "×", scale: 1, low: 0.05, high: 100, log: true,
      hint: "the server takes this many times as long as in its profile" },
    { key: "slowdown", label: "device slow-down", unit: "×", scale: 1, low: 0.05, high: 100, log: true,
      hint: "the device takes this many times as long as in its profile" },
  ];
  // What an objective makes small: as a choice, and before its value.
  const OBJECTIVES = {
    latency: ["latency (time until the answer)", "latency"],
    energy: ["energy (of the device)", "energy of the device"],
    throughput: ["throughput (time per answer)", "in a stream an answer every"],
    server_time: ["server time (time it computes)", "server time"],
  };
  const KEYS = {
    head: "head (on the device)", tail: "tail (on the server)", device: "device (computing)",
    radio: "radio (sending and receiving)",
  };
  const RED = "#D55E00", DEVICE = "#CC79A7", GREYS = ["#d5d5d5", "#999999"];
  const VIRIDIS = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#f0e51f"];
  const ACROSS = 61, UP = 41;
  const [UPLINK, , , ...UPWARDS] = SLIDERS;
  const find = (id) => document.getElementById(id);
  const named = (list, name) => list.find((entry) => entry.name === name);
  const settings = { ...data.start, upwards: UPWARDS[0].key };

  // ---- the decision, as Frontier.best makes it --------------------------------------------------------------------

  // What each of a row's columns is multiplied with. Energy and what the radio takes are 0 unless asked for.
  function weigh(s, objective) {
    const up = 8 / s.uplink_bit_s, down = (8 * data.answer_bytes) / s.downlink_bit_s;
    const weights = {
      slowdown: s.slowdown, load: s.load, up, down, throughput: objective.throughput, joules: objective.energy,
      in_flight: objective.in_flight, round_trip: s.round_trip_s,
      device: objective.latency * s.slowdown,
      bytes: objective.latency * up,
      server: objective.latency * s.load + objective.server_time,
      crosses: objective.latency * (s.round_trip_s + down),
    };
    if (objective.energy) {
      const radio = named(data.links, s.link).radio;
      weights.bytes += objective.energy * up * (radio.up_w_per_bit_s * s.uplink_bit_s + radio.base_w);
      weights.crosses +=
        objective.energy * (down * (radio.down_w_per_bit_s * s.downlink_bit_s + radio.base_w) + radio.tail_j);
    }
    return weights;
  }

  function cost(row, w) {
    const device = row.head_s + row.encode_s, server = row.tail_s + row.decode_s, crosses = row.on_device ? 0 : 1;
    let sum = device * w.device + row.size_bytes * w.bytes + server * w.server + crosses * w.crosses;
    if (w.joules) sum += row.device_j * w.joules;
    if (w.throughput) {
      let slowest = Math.max(device * w.slowdown, row.size_bytes * w.up, server * w.load, crosses * w.down);
      if (w.in_flight) {
        const latency = device * w.slowdown + row.size_bytes * w.up + server * w.load + crosses * (w.round_trip + w.down);
        slowest = Math.max(slowest, latency / w.in_flight);
      }
      sum += w.throughput * slowest;
    }
    return sum;
  }

  // The position of the cheapest of some rows, of equal ones the first; -1 when none keeps to the limits.
  function decide(positions, s) {
    const weights = weigh(s, named(data.objectives, s.objective));
    const limits = [["latency_s", "latency"], ["energy_j", "energy"]]
      .filter(([limit]) => data.limits[limit] !== null)
      .map(([limit, name]) => [data.limits[limit], weigh(s, named(data.objectives, name))]);
    let best = -1, least = Infinity;
    for (const i of positions) {
      const value = cost(rows[i], weights);
      if (value < least && limits.every(([most, w]) => cost(rows[i], w) <= most)) [best, least] = [i, value];
    }
    return best;
  }

  function terms(row, s) {
    const head = s.slowdown * row.head_s, encode = s.slowdown * row.encode_s;
    if (row.on_device) {
      const all = head + encode;
      return { head: all, encode: 0, uplink: 0, decode: 0, tail: 0, downlink: 0, interval: all, radio: 0 };
    }
    const up = (8 * row.size_bytes) / s.uplink_bit_s, down = (8 * data.answer_bytes) / s.downlink_bit_s;
    const decode = s.load * row.decode_s, tail = s.load * row.tail_s, { radio } = named(data.links, s.link);
    const { in_flight: inFlight } = named(data.objectives, s.objective);
    return {
      head, encode, uplink: s.round_trip_s / 2 + up, decode, tail, downlink: s.round_trip_s / 2 + down,
      interval: Math.max(head + encode, up, tail + decode, down,
        (head + encode + s.round_trip_s + up + decode + tail + down) / (inFlight ?? Infinity)),
      radio: radio && up * (radio.up_w_per_bit_s * s.uplink_bit_s + radio.base_w) +
        down * (radio.down_w_per_bit_s * s.downlink_bit_s + radio.base_w) + radio.tail_j,
    };
  }

  // ---- text -------------------------------------------------------------------------------------------------------

  // Plotly takes tags in its texts, and layers may have any name.
  const escape = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const digits = (value) => String(Number(value.toPrecision(4)));
  const scaled = (most, unit) => most >= 1 ? [1, unit] : most >= 1e-3 ? [1e3, `m${unit}`] : [1e6, `µ${unit}`];
  function quantity(value, unit) {
    if (!unit) return digits(value);
    const [scale, name] = scaled(value, unit);
    return `${digits(value * scale)} ${name}`;
  }
  const size = (bytes) => (bytes >= 1e6 ? `${(bytes / 1e6).toFixed(2)} MB` : `${(bytes / 1e3).toFixed(1)} kB`);
  const sentText = (row) => (row.on_device ? "" : ` (${size(row.size_bytes)} sent)`);
  const cutText = (row) => row.place + sentText(row);

  // ---- the charts -------------------------------------------------------------------------------------------------

  const knowsEnergy = (s) => data.has_energy && named(data.links, s.link).radio !== null;
  const FONT = { family: "system-ui, sans-serif", size: 12, color: "#222" };
  // Not responsive: Plotly would forget the height that a chart was given, and the page draws anew when it is resized.
  const CONFIG = { displayModeBar: false };

  const STAR = { symbol: "star", size: 20, color: RED, line: { color: "#fff", width: 1.5 } };
  const NARROW_PX = 560, NOTHING = "every cut breaks a limit";

  // A list of what a chart's colors and marks mean. Plotly's own legend would cover the chart on a phone.
  function key(what, entries) {
    find(what).parentElement.querySelector(".key").replaceChildren(...entries.map(([text, color, mark]) => {
      const [item, swatch, label] = ["li", "span", "span"].map((tag) => document.createElement(tag));
      swatch.className = "swatch";
      Object.assign(swatch.style, mark ? { color } : { background: color });
      swatch.textContent = mark ?? "";
      label.textContent = text;
      item.append(swatch, label);
      return item;
    }));
  }

  // Stacked bars of what each run's best cut costs: upright, or on a narrow screen lying, so that names have room. The
  // chosen bar has a band behind it, a frame around it and a star at its end, so it is seen however short it is.
  function stack(what, unit, bars, parts, dots, star) {
    const totals = bars.map((bar) => parts.reduce((sum, [name]) => sum + bar.terms[name], 0));
    const most = Math.max(...totals), [scale, name] = scaled(most, unit);
    const lying = find(what).clientWidth < NARROW_PX;
    const at = bars.map((_, i) => i);
    const placed = (along, values) => (lying ? { x: values, y: along } : { x: along, y: values });
    const used = parts.filter(([part]) => bars.some((bar) => bar.terms[part] > 0));
    const traces = used.map(([part, color]) => ({
      type: "bar", orientation: lying ? "h" : "v", marker: { color }, hoverinfo: "text",
      ...placed(at, bars.map((bar) => bar.terms[part] * scale)),
      hovertext: bars.map((bar, i) =>
        `${escape(cutText(bar.row))}<br>${part} ${quantity(bar.terms[part], unit)} of ${quantity(totals[i], unit)}`),
    }));
    if (dots) {
      traces.push({
        type: "scatter", mode: "markers", marker: { symbol: "diamond", color: "#000", size: 7 }, hoverinfo: "text",
        ...placed(at, bars.map((bar) => bar.terms.interval * scale)),
        hovertext: bars.map((bar) => `an answer every ${quantity(bar.terms.interval, unit)}`),
      });
    }
    traces.push({
      type: "scatter", mode: "text", ...placed([star], [totals[star] * scale]), cliponaxis: false,
      text: [lying ? `★ ${quantity(totals[star], unit)}` : "★"], textposition: lying ? "middle right" : "top center",
      textfont: { color: RED, size: lying ? 14 : 22 }, hoverinfo: "text", hovertext: [escape(cutText(bars[star].row))],
    });
    key(what, [
      ...used.map(([part, color]) => [KEYS[part] ?? part, color]),
      ...(dots ? [["time between the answers of a stream", "#000", "◆"]] : []),
      ["chosen", RED, "★"],
    ]);
    const labels = bars.map((bar, i) => {
      const label = escape(lying ? bar.brief : bar.label);
      return i === star ? `★ ${label}` : label;
    });
    const longest = Math.max(...labels.map((label) => label.length));
    const names = { tickvals: at, ticktext: labels, tickangle: lying ? 0 : -55, automargin: true, showgrid: false };
    const values = {
      title: { text: `${what} (${name})` }, zeroline: true,
      range: [0, scale * (lying ? Math.max(most * 1.05, totals[star] * 1.8) : most * 1.15) || 1],
    };
    const [across, end] = lying ? ["y", "x"] : ["x", "y"];
    const span = (half) => ({ [`${across}0`]: star - half, [`${across}1`]: star + half });
    Plotly.react(what, traces, {
      font: FONT, barmode: "stack", bargap: 0.2, showlegend: false,
      width: find(what).clientWidth, height: lying ? 70 + 24 * bars.length : 270 + 5.5 * longest,
      margin: lying ? { l: 10, r: 10, t: 5, b: 45 } : { l: 65, r: 10, t: 5, b: 20 },
      xaxis: lying ? values : { ...names, range: [-0.6, at.length - 0.4] },
      yaxis: lying ? { ...names, range: [at.length - 0.4, -0.6] } : values,
      shapes: [
        { type: "rect", layer: "below", [`${end}ref`]: "paper", ...span(0.5), [`${end}0`]: 0, [`${end}1`]: 1,
          fillcolor: "#fbe3d6", line: { width: 0 } },
        { type: "rect", ...span(0.4), [`${end}0`]: 0, [`${end}1`]: totals[star] * scale,
          line: { color: RED, width: 2 } },
      ],
    }, CONFIG);
  }

  function spread(slider, count) {
    const [low, high] = [Math.log10(slider.low), Math.log10(slider.high)];
    return Array.from({ length: count }, (_, i) => low + ((high - low) * i) / (count - 1));
  }
  const across = spread(UPLINK, ACROSS);

  // The color at a share of the way along some.
  function between(colors, share) {
    const at = share * (colors.length - 1), low = Math.min(Math.floor(at), colors.length - 2);
    const mixed = [1, 3, 5].map((k) => {
      const [a, b] = [colors[low], colors[low + 1]].map((color) => parseInt(color.slice(k, k + 2), 16));
      return Math.round(a + (b - a) * (at - low));
    });
    return `rgb(${mixed})`;
  }

  // Both ends keep their colors, so that what is between them is told apart from them at every setting.
  function colorsOf(used) {
    const kind = (i) => (rows[i].on_device ? "device" : rows[i].index === 0 ? "server" : "cut");
    return used.map((i) => {
      if (kind(i) === "device") return DEVICE;
      const alike = used.filter((other) => kind(other) === kind(i));
      const share = alike.length > 1 ? alike.indexOf(i) / (alike.length - 1) : 0.5;
      return between(kind(i) === "server" ? GREYS : VIRIDIS, share);
    });
  }

  function drawMap() {
    const upward = UPWARDS.find(({ key }) => key === settings.upwards), upwards = spread(upward, UP);
    const chosen = upwards.map((factor) => across.map((rate) =>
      decide(frontiers[settings.codec],
        { ...settings, [upward.key]: 10 ** factor, uplink_bit_s: 1e6 * 10 ** rate })));
    const used = [...new Set(chosen.flat())].filter((i) => i >= 0)
      .sort((a, b) => rows[a].index - rows[b].index || rows[b].size_bytes - rows[a].size_bytes);
    const colors = colorsOf(used);
    const rank = new Map(used.map((i, k) => [i, k]));
    const narrow = find("map").clientWidth < NARROW_PX;
    const ticks = (slider, values) => ({
      showgrid: false, zeroline: false,
      tickvals: values.map(Math.log10), ticktext: values.map(String),
      range: [Math.log10(slider.low), Math.log10(slider.high)],
    });
    Plotly.react("map", [
      {
        type: "heatmap", x: across, y: upwards, z: chosen.map((line) => line.map((i) => rank.get(i) ?? null)),
        zmin: -0.5, zmax: used.length - 0.5, showscale: false, hoverinfo: "text",
        colorscale: colors.flatMap((c, k) => [[k / colors.length, c], [(k + 1) / colors.length, c]]),
        hovertext: chosen.map((line, k) => line.map((i, j) =>
          `${digits(10 ** across[j])} Mbit/s, ${upward.label} ${digits(10 ** upwards[k])}<br>` +
          (i < 0 ? NOTHING : escape(cutText(rows[i]))))),
      },
      {
        type: "scatter", mode: "markers", x: [Math.log10(settings.uplink_bit_s / 1e6)],
        y: [Math.log10(settings[upward.key])], marker: STAR, hoverinfo: "text", hovertext: ["the present settings"], showlegend: false,
      },
    ], {
      font: FONT, width: find("map").clientWidth, height: 400, margin: { l: 65, r: 30, t: 10, b: 50 },
      xaxis: {
        title: { text: "uplink (Mbit/s)" },
        ...ticks(UPLINK, narrow ? [0.01, 1, 100, 10000] : [0.01, 0.1, 1, 10, 100, 1000, 10000]),
      },
      yaxis: { title: { text: `${upward.label} (×)` }, ...ticks(upward, [0.1, 0.3, 1, 3, 10, 30, 100]) },
    }, CONFIG);
    const entries = used.map((i, k) => {
      // Two cuts across parallel branches can bear the same name; they differ in what they send.
      const alone = used.every((other) => other === i || rows[other].place !== rows[i].place);
      return [alone ? rows[i].place : cutText(rows[i]), colors[k]];
    });
    if (chosen.flat().includes(-1)) entries.push([NOTHING, "#fff"]);
    find("legend").replaceChildren(...entries.map(([label, color]) => {
      const [item, swatch, text] = ["li", "i", "span"].map((tag) => document.createElement(tag));
      swatch.style.background = color;
      text.textContent = label;
      item.append(swatch, text);
      return item;
    }));
  }

  function show_chart(what, shown) {
    find(what).hidden = find(what).parentElement.hidden = !shown;
  }

  function draw() {
    const objective = named(data.objectives, settings.objective), weights = weigh(settings, objective);
    const best = decide(frontiers[settings.codec], settings), choice = find("choice");
    choice.dataset.row = best;
    drawMap();
    show_chart("latency", best >= 0);
    show_chart("energy", best >= 0 && knowsEnergy(settings));
    if (best < 0) {
      choice.textContent = "Nothing can be chosen: at these settings every cut breaks a limit.";
      find("others").textContent = `The limits: ${data.constraints.join(", ")}.`;
      return;
    }
    const value = cost(rows[best], weights), what = OBJECTIVES[objective.name.split(" with ")[0]]?.[1] ?? "weighted sum";
    choice.textContent = `★ ${cutText(rows[best])}: ${what} ${quantity(value, objective.unit)}`;
    const ends = ["all on the device", "all on the server"].map((name, k) => {
      const end = Math.min(...frontiers[settings.codec]
        .filter((i) => (k ? rows[i].index === 0 : rows[i].on_device)).map((i) => cost(rows[i], weights)));
      if (end === Infinity) return `${name} is not allowed`;
      const times = value > 0 ? Number((end / value).toPrecision(3)) : 1;
      const more = times > 1 ? ` (${times} times as much)` : "";
      return `${name} ${quantity(end, objective.unit)}${more}`;
    });
    find("others").textContent = `For comparison: ${ends.join(", ")}.`;
    const bars = runs.map((run) => {
      const mine = run.rows.filter((i) =>
        settings.codec === anyCodec || rows[i].on_device || rows[i].codec === settings.codec);
      const i = mine.includes(best) ? best : decide(mine, settings);
      return { label: run.label, brief: run.brief, row: rows[i], terms: i < 0 ? null : terms(rows[i], settings) };
    }).filter((bar) => bar.row);
    const star = bars.findIndex((bar) => bar.row === rows[best]);
    stack("latency", "s", bars, data.parts, objective.throughput > 0, star);
    if (knowsEnergy(settings)) {
      const joules = bars.map((bar) => ({ ...bar, terms: { device: bar.row.device_j, radio: bar.terms.radio } }));
      stack("energy", "J", joules, [["device", "#0072B2"], ["radio", "#E69F00"]], false, star);
    }
  }

  // ---- the settings -----------------------------------------------------------------------------------------------

  const shown = [];
  let waiting = 0;
  function addField(label, hint, ...inputs) {
    const field = document.createElement("label"), small = document.createElement("small");
    small.textContent = hint ?? "";
    field.append(label, ...inputs, ...(hint ? [small] : []));
    find("settings").append(field);
  }

  function addSelect(setting, label, hint, options, changed) {
    const select = document.createElement("select");
    select.id = setting;
    select.append(...options.map(([value, text]) => new Option(text, value)));
    select.value = settings[setting];
    select.addEventListener("change", () => {
      settings[setting] = select.value;
      changed?.();
      show();
    });
    addField(label, hint, select);
    return select;
  }

  function addSlider(slider) {
    const range = document.createElement("input"), number = document.createElement("input");
    const position = slider.log ? Math.log10 : (value) => value;
    Object.assign(range, { type: "range", id: slider.key, min: position(slider.low), max: position(slider.high) });
    range.step = slider.log ? 0.01 : 1;
    const { low: min, high: max } = slider;
    Object.assign(number, { type: "number", id: `${slider.key}-number`, min, max, step: "any" });
    range.setAttribute("aria-label", slider.label);
    range.addEventListener("input", () => {
      settings[slider.key] = slider.scale * (slider.log ? 10 ** range.valueAsNumber : range.valueAsNumber);
      show();
    });
    number.addEventListener("change", () => {
      if (!(number.valueAsNumber >= slider.low && number.valueAsNumber <= slider.high)) return show();
      settings[slider.key] = slider.scale * number.valueAsNumber;
      return show();
    });
    shown.push(() => {
      const value = settings[slider.key] / slider.scale;
      range.value = position(value);
      number.value = digits(value);
    });
    addField(slider.label, slider.hint, number, slider.unit, range);
  }

  const takeLink = () => {
    const { uplink_bit_s, downlink_bit_s, round_trip_s } = named(data.links, settings.link);
    Object.assign(settings, { uplink_bit_s, downlink_bit_s, round_trip_s });
  };

  function show() {
    const energy = knowsEnergy(settings);
    for (const option of objectives.options) {
      option.disabled = named(data.objectives, option.value).energy > 0 && !energy;
    }
    if (objectives.selectedOptions[0].disabled) objectives.value = settings.objective = "latency";
    for (const refresh of shown) refresh();
    // A drag moves a slider more often than a screen shows it.
    waiting ||= requestAnimationFrame(() => { waiting = 0; draw(); });
  }

  takeLink();
  const same = (names) => names.map((name) => [name, name]);
  const objectives = addSelect("objective", "objective", "the best cut is the one with the least of it",
    data.objectives.map(({ name }) => [name, OBJECTIVES[name]?.[0] ?? name]));
  addSelect("codec", "codec", "how the data that is sent is compressed", same(codecs));
  const links = same(data.links.map((link) => link.name));
  addSelect("link", "link", "sets the next three, and the radio's power", links, takeLink);
  SLIDERS.forEach(addSlider);
  addSelect("upwards", "map upwards", "what the map below varies beside the uplink",
    UPWARDS.map(({ key, label }) => [key, label]));
  find("note").textContent = [
    data.constraints.length ? `Limits: ${data.constraints.join(", ")}. Cuts that break one are not shown.` : "",
    data.has_energy ? "" : "Energy cannot be chosen or shown, since the device's profile holds no joules.",
  ].join(" ").trim();
  show();
  draw();
  window.addEventListener("resize", show);
  find("map").on("plotly_click", ({ points: [point] }) => {
    settings.uplink_bit_s = 1e6 * 10 ** point.x;
    settings[settings.upwards] = 10 ** point.y;
    show();
  });
})();
